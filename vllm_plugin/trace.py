# SPDX-License-Identifier: Apache-2.0
"""Routing traces: which experts each row of a request used, and would have used.

Off unless the operator sets `trace_dir`: a trace tells nearly as much as the text.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.probes import PROBE

logger = compat.get_logger(__name__)


class TraceRecorder:
    """Writes one safetensors file per finished request into a folder.

    Tensors of a file, for R rows and L layers: `positions` [R] int64, `stock_ids`
    [R, L, width] (the model's own choice on the same logits), `topk_ids` and
    `topk_weights` [R, L, width]. The file is named after the request's id.
    """

    def __init__(self, folder: Path, num_layers: int):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._num_layers = num_layers
        self._step: list[tuple[str, int, int]] = []
        self._layers: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._rows: dict[str, list[tuple[np.ndarray, ...]]] = defaultdict(list)

    def begin_step(
        self,
        req_ids: Sequence[str],
        num_scheduled: np.ndarray,
        num_computed: np.ndarray,
    ) -> None:
        """Note the coming step's rows, after filing those of the last one."""
        self._file_step()
        counts, starts = num_scheduled.tolist(), num_computed.tolist()
        self._step = list(zip(req_ids, counts, starts, strict=True))

    def observe(
        self,
        layer: int,
        stock_ids: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> None:
        """Take one layer's choices [T, width]; layers come in order."""
        total = sum(count for _, count, _ in self._step)
        if total and len(self._layers) < self._num_layers:
            arrays = (stock_ids, topk_ids, topk_weights)
            self._layers.append(tuple(a[:total].numpy().copy() for a in arrays))

    def _file_step(self) -> None:
        if len(self._layers) == self._num_layers:
            stock, ids, weights = (
                np.stack([layer[part] for layer in self._layers], axis=1)
                for part in range(3)
            )
            offset = 0
            for req_id, count, start in self._step:
                rows = slice(offset, offset + count)
                positions = np.arange(start, start + count)
                parts = (positions, stock[rows], ids[rows], weights[rows])
                self._rows[req_id].append(parts)
                offset += count
        self._layers, self._step = [], []

    def finish(self, req_ids: Iterable[str]) -> None:
        """Write and forget the traces of finished requests."""
        self._file_step()
        for req_id in req_ids:
            rows = self._rows.pop(req_id, None)
            if rows and PROBE not in req_id:  # the engine's own, which nobody asked for
                self._write(req_id, rows)

    def _write(self, req_id: str, rows: list[tuple[np.ndarray, ...]]) -> None:
        names = ("positions", "stock_ids", "topk_ids", "topk_weights")
        tensors = {
            name: np.ascontiguousarray(np.concatenate([row[i] for row in rows]))
            for i, name in enumerate(names)
        }
        path = self.folder / (re.sub(r"[^A-Za-z0-9._-]", "_", req_id) + ".safetensors")
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file(tensors, partial)
            partial.replace(path)
        except (OSError, SafetensorError) as err:
            # a full disk must not stop the engine; the operator reads the log
            logger.error("moe-tta could not write trace %s: %s", path, err)
