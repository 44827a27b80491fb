# SPDX-License-Identifier: Apache-2.0
"""The differentiable forward: a transformers model on weights that are not its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from moe_tta.adapter.errors import AdapterError
from moe_tta.adapter.families import family_of, router_shape
from moe_tta.adapter.fused import fuse
from moe_tta.adapter.graphs import CudaCapture, Graphs, Passes
from moe_tta.adapter.linear import FrozenEmbedding, FrozenLinear
from moe_tta.adapter.mapped import map_checkpoint, model_names, take_experts
from moe_tta.adapter.packed_attention import PACKED_SDPA
from moe_tta.adapter.packing import Packing
from moe_tta.adapter.routing import AdaptedRouter, EditTables, LayerEdit
from moe_tta.adapter.served import view_served
from moe_tta.kernels.reference import Routing

# decoder layer, router logits [T, E], its routing
Watch = Callable[[int, torch.Tensor, Routing], None]


class Shared(NamedTuple):
    """What all layers of one pass over [R, T] or [1, N] packed rows share."""

    rope: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None  # [R or 1, 1, T, keys] bool; None is causal
    cache: Any = None  # has `update(keys, values, layer)`, as transformers' caches
    packing: Packing | None = None


class AdapterModel:
    """A model whose routers take edits and whose weights take no gradient.

    Attributes:
        config: The transformers config.
        shape: Its routers; `k_max` is the model's own `top_k`.
        lm: The transformers model with routers (and, mapped or on a GPU, experts)
            replaced.
        device: Where weights and activations live.
        dtype: Of activations.
        passes: How whole passes are run.
    """

    def __init__(self, lm: nn.Module, dtype: torch.dtype, device: torch.device):
        self.config, self.lm = lm.config, lm.eval()
        self.passes = Passes()
        self.shape = router_shape(lm.config)
        self.dtype, self.device = dtype, device
        tables = EditTables(self.shape, device)
        for number in self.shape.layers:
            block = self.layers[number].mlp
            block.gate = AdaptedRouter(block.gate.weight, self.shape, tables)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.lm.model.layers

    @staticmethod
    @torch.inference_mode(False)  # else the weights could not be saved for backward
    def from_checkpoint(
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> AdapterModel:
        """Build on a checkpoint's files: memory-mapped on CPU, read onto a GPU.

        Args:
            folder: With `config.json` and `*.safetensors`.
            dtype: Of activations; `None` is that of the files. Another one casts one
                matrix at a time for each product and keeps none of the casts.
            device: Where weights and activations live.

        Raises:
            AdapterError: the family, the files or the weights' form are not supported.
        """
        config = AutoConfig.from_pretrained(folder)
        family = family_of(config)
        device = torch.device(device)
        tensors = map_checkpoint(Path(folder), device)
        lm = _empty(config, "eager")
        take_experts(lm, tensors, family)
        state = model_names(lm, tensors, family)
        stored = _one_dtype(state)
        _assign(lm, state, device)
        if dtype not in (None, stored):
            _cast_activations(lm, dtype)
        return AdapterModel(lm, dtype or stored, device)

    @staticmethod
    @torch.inference_mode(False)
    def from_served(config: Any, tensors: Mapping[str, torch.Tensor]) -> AdapterModel:
        """Build on the tensors of a loaded vLLM model: views, no copy.

        Args:
            config: The transformers config of the model.
            tensors: vLLM's `named_parameters()`, whole (no tensor parallelism).

        Raises:
            AdapterError: see `view_served` and `family_of`.
        """
        family = family_of(config)
        lm = _empty(config, "eager")
        state = view_served(lm, tensors, family)
        sample = state["model.norm.weight"]
        _assign(lm, state, sample.device)
        model = AdapterModel(lm, sample.dtype, sample.device)
        if sample.is_cuda and sample.dtype == torch.bfloat16:
            fuse(model.lm)
            model.passes = Graphs(CudaCapture())
        return model

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every weight by name; experts of a mapped checkpoint one by one."""
        yield from self.lm.named_parameters()
        for name, module in self.lm.named_modules():
            for expert, matrices in enumerate(getattr(module, "matrices", ())):
                for kind, matrix in zip(("gate", "up", "down"), matrices, strict=True):
                    yield f"{name}.{expert}.{kind}", matrix

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return hidden states [R, T, H] of token ids [R, T]."""
        return self.lm.model.embed_tokens(tokens)

    def shared(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Any = None,
        packing: Packing | None = None,
    ) -> Shared:
        """Prepare a pass over hidden states at absolute positions [R or 1, T].

        With a packing, which takes no cache: [1, N, H] at positions [1, N] in texts.
        """
        rope = self.lm.model.rotary_emb(hidden, position_ids=positions)
        return Shared(rope, mask, cache, packing)

    def run(
        self,
        hidden: torch.Tensor,
        layers: range,
        shared: Shared,
        edits: Mapping[int, LayerEdit],
        watch: Watch | None = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Run decoder layers and return the hidden states after the last, as `hidden`.

        Args:
            hidden: [R, T, H], or packed [1, N, H], before the first of them.
            layers: Which, in order.
            shared: From `shared`.
            edits: By decoder layer.
            watch: Sees each MoE layer's routing.
            recompute: Keep only layer inputs for the backward pass and run each layer
                again there: less memory, one more forward.
        """
        for number in layers:
            arguments = (number, hidden, shared, edits.get(number), watch)
            if recompute and torch.is_grad_enabled():
                hidden = checkpoint(
                    self._run_layer,
                    *arguments,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                hidden = self._run_layer(*arguments)
        return hidden

    def _run_layer(
        self,
        number: int,
        hidden: torch.Tensor,
        shared: Shared,
        edit: LayerEdit | None,
        watch: Watch | None,
    ) -> torch.Tensor:
        layer = self.layers[number]
        router = getattr(layer.mlp, "gate", None)
        if isinstance(router, AdaptedRouter):
            router.edit = edit
            router.observe = watch and (lambda z, chosen: watch(number, z, chosen))
        try:
            return layer(
                hidden,
                position_embeddings=shared.rope,
                attention_mask=shared.mask,
                past_key_values=shared.cache,
                packing=shared.packing,
            )
        finally:
            if isinstance(router, AdaptedRouter):
                router.edit = router.observe = None


def _empty(config: Any, experts: str) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            attn_implementation=PACKED_SDPA,
            experts_implementation=experts,
        )


def _one_dtype(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise AdapterError(f"the checkpoint holds weights of several dtypes: {names}")
    return dtypes.pop()


def _assign(lm: nn.Module, state: dict[str, torch.Tensor], device: torch.device):
    lm.requires_grad_(False)
    dtype = state["model.norm.weight"].dtype
    unitless = {
        name: torch.empty(wanted.shape, dtype=dtype, device=device)
        for name, wanted in lm.state_dict().items()
        if not wanted.numel()
    }
    lm.load_state_dict(state | unitless, assign=True)
    # the one buffer that no checkpoint holds: inverse frequencies
    with torch.device(device):
        lm.model.rotary_emb = type(lm.model.rotary_emb)(config=lm.config)


def _cast_activations(lm: nn.Module, dtype: torch.dtype) -> None:
    """Let activations have `dtype` while matrices stay as they are stored."""
    for parent in list(lm.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, FrozenLinear(child))
            elif isinstance(child, nn.Embedding):
                setattr(parent, name, FrozenEmbedding(child, dtype))
            elif child._parameters.keys() == {"weight"} and child.weight.dim() == 1:
                child.to(dtype)  # a norm: H numbers
