# SPDX-License-Identifier: Apache-2.0
"""The adapter of a worker: built when the model has been loaded, or refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moe_tta.adapter import AdapterError, AdapterModel
from moe_tta.adapter.graphs import Graphs
from moe_tta.adapter.job import warm_up
from moe_tta.remix.checkpoint import find_checkpoint
from moe_tta.remix.errors import StoreError
from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.model_shape import UnsupportedModelError
from moe_tta.vllm_plugin.remix_service import RemixService
from moe_tta.vllm_plugin.reroute_service import RerouteService

if TYPE_CHECKING:
    from moe_tta.vllm_plugin.services import Service

logger = compat.get_logger(__name__)

# by `Work.service`; all of them share one model
SERVICES: dict[str, Callable[[AdapterModel], Service]] = {
    "remix": RemixService,
    "reroute": RerouteService,
}


def load_services(vllm_config: Any, model: Any) -> dict[str, Service]:
    """Build the adapter on a loaded model, and every service on it.

    Args:
        vllm_config: The engine's configuration.
        model: vLLM's loaded module.

    Raises:
        UnsupportedModelError: no gradient passes this model or set-up.
    """
    try:
        adapter = _load(vllm_config, model)
    except (AdapterError, StoreError) as err:
        raise UnsupportedModelError.because(
            f"the setting adapter is on, and {str(err).rstrip('.')}; leave it out, or "
            "set adapter.gradients to false, for reroute with optimizer 'spsa' alone"
        ) from err
    logger.info("moe-tta's adapter reads the model's weights on %s", adapter.device)
    if isinstance(adapter.passes, Graphs):  # their kernels compile when first run
        begin = time.perf_counter()
        warm_up(adapter)
        took = time.perf_counter() - begin
        logger.info("moe-tta's adapter has its kernels after %.1f s", took)
    return {name: make(adapter) for name, make in SERVICES.items()}


def _load(vllm_config: Any, model: Any) -> AdapterModel:
    config = vllm_config.model_config
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        raise AdapterError("tensor parallelism gives each GPU a part of every matrix")
    if config.quantization is not None:
        raise AdapterError(f"its weights are quantised ({config.quantization})")
    if vllm_config.device_config.device_type != "cpu":
        _refuse_other_layouts(model)
        return AdapterModel.from_served(
            config.hf_text_config, dict(model.named_parameters())
        )
    # vLLM repacks and frees weights on CPU: the files hold the same numbers
    return AdapterModel.from_checkpoint(
        find_checkpoint(config.model, config.revision), config.dtype
    )


def _refuse_other_layouts(model: Any) -> None:
    """Refuse experts whose kernel has vLLM reorder their weights.

    Shapes do not tell: FlashInfer's kernels swap gate and up, or permute rows.

    Source: `convert_to_unquantized_kernel_format` of vLLM 0.32.0.

    Raises:
        AdapterError: experts other than vLLM's Triton ones.
    """
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is None or compat.is_triton_experts(kernel.fused_experts):
            continue
        raise AdapterError(
            f"{type(kernel.fused_experts).__name__} may hold expert weights in an "
            "order of their own; start vLLM with --moe-backend triton"
        )
