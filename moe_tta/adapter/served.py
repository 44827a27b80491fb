# SPDX-License-Identifier: Apache-2.0
"""A loaded vLLM model's tensors under transformers' names, as views of them.

Source: names and layouts in vLLM 0.32.0 of `layers/fused_moe/routed_experts.py` and
`models/{mixtral,olmoe,qwen2_moe,qwen3_moe}.py` under `vllm/model_executor/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_tta.adapter.errors import AdapterError
from moe_tta.adapter.families import Family
from moe_tta.adapter.mapped import check_shape

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# entry of the config that says how wide the dense FFN in an MLP, or below it, is
SIZES = {None: "intermediate_size", "shared_expert": "shared_expert_intermediate_size"}
EXPERTS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}


class Part(NamedTuple):
    """Rows of one of vLLM's tensors; all of them where `rows` is `None`."""

    name: str
    rows: tuple[int, int] | None = None


def served_part(name: str, config: Any, family: Family) -> Part:
    """Say where vLLM keeps one of transformers' tensors.

    Args:
        name: As `state_dict` of the transformers model gives it.
        config: The model's config.
        family: Its family.
    """
    if match := re.fullmatch(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)", name):
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        query = config.num_attention_heads * width
        key = config.num_key_value_heads * width
        ends = {"q": (0, query), "k": (query, query + key)}
        ends["v"] = (query + key, query + 2 * key)
        return Part(f"{match[1]}.qkv_proj.{match[3]}", ends[match[2]])
    if match := re.fullmatch(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)", name):
        block = f"{match[1]}.{family.block}.experts.routed_experts"
        return Part(f"{block}.{EXPERTS[match[2]]}")
    if match := re.fullmatch(r"(.*\.mlp(?:\.(\w+))?)\.(gate|up)_proj\.weight", name):
        size = getattr(config, SIZES[match[2]])
        start = 0 if match[3] == "gate" else size
        return Part(f"{match[1]}.gate_up_proj.weight", (start, start + size))
    if name in ("lm_head.weight", "model.embed_tokens.weight"):
        return Part(name, (0, config.vocab_size))  # vLLM pads the vocabulary
    return Part(name.replace(".mlp.gate.", f".{family.block}.gate."))


def view_served(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], family: Family
) -> dict[str, torch.Tensor]:
    """Return vLLM's tensors under transformers' names, without copying one.

    Args:
        model: A transformers causal language model on the meta device.
        tensors: The vLLM model's `named_parameters()`.
        family: Of the model.

    Raises:
        AdapterError: vLLM has freed or cut a tensor, holds it in another form, or
            gradients cannot be taken through it.
    """
    views = {}
    for name, wanted in model.state_dict().items():
        if not wanted.numel():
            continue  # a shared expert without units, which vLLM leaves out
        part = served_part(name, model.config, family)
        if name == "lm_head.weight" and part.name not in tensors:
            part = served_part("model.embed_tokens.weight", model.config, family)
        tensor = _check_served(part.name, tensors)
        if part.rows is not None:
            first, end = part.rows
            tensor = tensor[first:end]
        views[name] = check_shape(part.name, tensor, tuple(wanted.shape))
    dtypes = {tensor.dtype for tensor in views.values()}
    if len(dtypes) > 1:
        raise AdapterError(
            f"vLLM holds weights of several dtypes: {sorted(map(str, dtypes))}"
        )
    return views


def _check_served(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if name not in tensors:
        raise AdapterError(
            f"vLLM holds no tensor {name}: its layers are quantised, or of another "
            "version than 0.32"
        )
    tensor = tensors[name].detach()
    if tensor.numel() == 0:
        raise AdapterError(
            f"vLLM has freed {name}, as it does on CPU after repacking it; build the "
            "adapter from the checkpoint's files instead"
        )
    if tensor.dtype not in FLOATS:
        raise AdapterError(f"vLLM holds {name} as {tensor.dtype}: quantised weights")
    if tensor.is_inference():
        raise AdapterError(
            f"{name} was made under torch.inference_mode: no gradient passes it"
        )
    return tensor
