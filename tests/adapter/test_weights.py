# SPDX-License-Identifier: Apache-2.0
"""Whose memory the adapter's weights are, and what it refuses to be built on."""

import gc
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from moe_tta.adapter import AdapterError, AdapterModel, Rerouting, reroute
from moe_tta.adapter.descent import autograd_gradient
from tests.adapter import independent
from tests.adapter.layouts import vllm_tensors
from tests.adapter.test_gradient import relative, size, tail_of


def mappings(path):
    """Return the address ranges of this process that map the file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return [(int(first, 16), int(end, 16)) for first, end in spans]


def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def test_mapped_weights_are_the_files_pages(tiny_models, family):
    folder = Path(tiny_models(family))
    model = AdapterModel.from_checkpoint(folder)
    spans = mappings((folder / "model.safetensors").resolve())
    assert spans
    for name, weight in model.weights():
        inside = [first <= weight.data_ptr() < end for first, end in spans]
        assert any(inside), name
        assert not weight.requires_grad


def test_the_lab_model_is_not_copied(lab):
    folder = lab("smollm2-moe")  # may be built here
    gc.collect()
    before = anonymous_bytes()
    model = AdapterModel.from_checkpoint(folder)
    total = sum(weight.nbytes for _, weight in model.weights())
    assert total > 1e9
    # modules and names; a copy of the smallest share of weights would show
    assert anonymous_bytes() - before < 0.05 * total


def test_another_dtype_keeps_the_stored_matrices(tiny_models, family):
    folder = Path(tiny_models(family))
    model = AdapterModel.from_checkpoint(folder, torch.float64)
    spans = mappings((folder / "model.safetensors").resolve())
    cast = [n for n, w in model.weights() if w.dtype != torch.float32]
    assert all(".norm." in n or "norm.weight" in n for n in cast)
    for name, weight in model.weights():
        if weight.dtype == torch.float32:
            assert any(a <= weight.data_ptr() < b for a, b in spans), name


def test_served_weights_are_views(tiny_models, family, draw):
    config, tensors = vllm_tensors(tiny_models(family))
    served = AdapterModel.from_served(config, tensors)
    owned = {t.untyped_storage().data_ptr() for t in tensors.values()}
    for name, weight in served.weights():
        assert weight.untyped_storage().data_ptr() in owned, name
        assert not weight.requires_grad
    key = next(name for name in tensors if name.endswith("0.self_attn.qkv_proj.weight"))
    heads = served.layers[0].self_attn
    assert heads.q_proj.weight.data_ptr() == tensors[key].data_ptr()
    ends = heads.q_proj.weight.nbytes + heads.k_proj.weight.nbytes
    assert heads.v_proj.weight.data_ptr() == tensors[key].data_ptr() + ends
    block = next(name for name in tensors if name.endswith("w13_weight"))
    stacked = served.layers[0].mlp.experts.gate_up_proj
    assert stacked.data_ptr() == tensors[block].data_ptr()


def test_served_and_mapped_agree(tiny_models, family, draw):
    mapped = AdapterModel.from_checkpoint(tiny_models(family))
    served = AdapterModel.from_served(*vllm_tensors(tiny_models(family)))
    delta, tokens = 0.3 * draw.normal(1, *size(mapped)), draw.tokens(20)
    theirs, ours = (
        autograd_gradient(tail_of(model, [tokens], delta).loss)(delta)
        for model in (mapped, served)
    )
    assert relative(ours[0], theirs[0]) <= 1e-5
    assert relative(ours[1], theirs[1]) <= 1e-5


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_a_dense_layer_of_qwen_is_viewed_too(tmp_path, draw, name):
    from transformers import AutoModelForCausalLM

    from tests.tiny import COMMON, CONFIGS

    fields = {**COMMON, **CONFIGS[name], "mlp_only_layers": [1]}
    config = AutoConfig.for_model(name, **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    mapped = AdapterModel.from_checkpoint(tmp_path)
    assert mapped.shape.layers == (0, 2, 3)
    served = AdapterModel.from_served(*vllm_tensors(tmp_path))
    delta, tokens = 0.3 * draw.normal(1, *size(mapped)), draw.tokens(20)
    losses = [tail_of(m, [tokens], delta).loss(delta) for m in (mapped, served)]
    assert relative(*losses) <= 1e-5


def test_a_shared_expert_without_units_is_no_tensor(tmp_path, draw):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from tests.tiny import COMMON, CONFIGS

    fields = {**COMMON, **CONFIGS["qwen2_moe_whole"]}
    fields |= {"shared_expert_intermediate_size": 0}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = {name: t for name, t in load_file(path).items() if t.numel()}
    save_file(stored, path, metadata={"format": "pt"})
    mapped = AdapterModel.from_checkpoint(tmp_path)
    served = AdapterModel.from_served(*vllm_tensors(tmp_path))
    delta, tokens = 0.3 * draw.normal(1, *size(mapped)), draw.tokens(20)
    expected = independent.context_gradient(
        independent.load(tmp_path), tokens, delta[0]
    )
    for model in (mapped, served):
        loss = tail_of(model, [tokens], delta).loss
        found, gradient = autograd_gradient(loss)(delta)
        assert relative(found, expected[0]) <= 1e-5
        assert relative(gradient[0], expected[1]) <= 1e-5


def test_weights_stay_as_they_are(tiny_models, family, draw):
    model = AdapterModel.from_checkpoint(tiny_models(family))
    before = {name: weight.clone() for name, weight in model.weights()}
    sequences = [draw.tokens(20), draw.tokens(12)]
    zeros = torch.zeros(2, *size(model))
    done = reroute(model, sequences, zeros, Rerouting(steps=2))
    assert done[0].delta.any()
    for name, weight in model.weights():
        assert torch.equal(weight, before[name]), name
        assert weight.grad is None


def served_error(config, tensors):
    with pytest.raises(AdapterError) as caught:
        AdapterModel.from_served(config, tensors)
    return str(caught.value)


def test_refuses_what_vllm_freed_cut_or_quantised(tiny_models):
    config, whole = vllm_tensors(tiny_models("mixtral"))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert "freed" in served_error(config, {**whole, name: torch.empty(0)})
    block = "model.layers.0.block_sparse_moe.experts.routed_experts.w13_weight"
    half = whole[block][:, :96]
    assert "one GPU" in served_error(config, {**whole, block: half})
    small = whole[name].to(torch.float8_e4m3fn)
    assert "quantised" in served_error(config, {**whole, name: small})
    missing = {key: value for key, value in whole.items() if key != block}
    assert "quantised, or of another" in served_error(config, missing)
    with torch.inference_mode():
        made = whole[name].clone()
    assert "inference_mode" in served_error(config, {**whole, name: made})


def test_refuses_other_families_and_configs(tiny_models, tmp_path):
    with pytest.raises(AdapterError, match=r"'gpt_oss' models; it knows mixtral, "):
        AdapterModel.from_checkpoint(tiny_models("gpt_oss"))
    folder = tmp_path / "clipped"
    shutil.copytree(tiny_models("olmoe"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "clip_qkv": 8.0}))
    with pytest.raises(AdapterError, match=r"clip_qkv = 8.0, but vLLM serves"):
        AdapterModel.from_checkpoint(folder)
    windowed = tmp_path / "windowed"
    shutil.copytree(tiny_models("qwen2_moe"), windowed)
    other = json.loads((windowed / "config.json").read_text())
    other["use_sliding_window"] = True
    (windowed / "config.json").write_text(json.dumps(other))
    with pytest.raises(AdapterError, match=r"use_sliding_window = True, but vLLM"):
        AdapterModel.from_checkpoint(windowed)
    quantised = {**config, "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(AdapterError, match="quantised"):
        AdapterModel.from_checkpoint(folder)


def test_refuses_an_incomplete_folder(tiny_models, tmp_path):
    shutil.copy(Path(tiny_models("mixtral")) / "config.json", tmp_path)
    with pytest.raises(AdapterError, match=r"no \*\.safetensors"):
        AdapterModel.from_checkpoint(tmp_path)
