# SPDX-License-Identifier: Apache-2.0
"""When the two launches of a contrast overlap, and what each is compiled to."""

import re
from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")
from moe_tta.kernels import contrast_triton
from moe_tta.kernels.contrast_triton import CHUNK, OVERLAPPED_CHUNK, ContrastRows
from tests.kernels.hopper import compile_for_hopper
from tests.kernels.test_launch import FakeKernel

CUDA = torch.device("cuda", 0)
TYPES = defaultdict(lambda: "fp32", leads_ptr="i64", followers_ptr="i64")
VOCAB = 50304
WAIT = "griddepcontrol.wait"
ABOUT_MEMORY = re.compile(r"griddepcontrol\.\w+|(?:ld|st)\.global")


@pytest.mark.parametrize(
    ("capability", "able"), [((8, 0), False), ((8, 9), False), ((9, 0), True)]
)
def test_launches_overlap_from_hopper_on(monkeypatch, capability, able):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert contrast_triton.can_overlap(CUDA) is able
    assert not contrast_triton.can_overlap(torch.device("cpu"))


def test_interpreted_kernels_and_amd_do_not_overlap(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    assert contrast_triton.can_overlap(CUDA)
    with monkeypatch.context() as amd:
        amd.setattr(torch.version, "hip", "6.4")
        assert not contrast_triton.can_overlap(CUDA)
    monkeypatch.setattr(contrast_triton, "_combine_kernel", FakeKernel())
    assert not contrast_triton.can_overlap(CUDA)


def test_overlap_where_there_is_none_is_refused():
    assert not ContrastRows(1, VOCAB, "cpu").overlap
    with pytest.raises(ValueError, match=r"capability 9\.0"):
        ContrastRows(1, VOCAB, "cpu", overlap=True)


@pytest.mark.parametrize(
    ("asked", "overlaps"), [((), True), ((True,), True), ((False,), False)]
)
def test_only_the_second_launch_may_begin_early(monkeypatch, asked, overlaps):
    """The first must wait for what wrote the logits."""
    best, combine = FakeKernel(compiles=False), FakeKernel(compiles=False)
    monkeypatch.setattr(contrast_triton, "can_overlap", lambda device: True)
    monkeypatch.setattr(contrast_triton, "_best_kernel", best)
    monkeypatch.setattr(contrast_triton, "_combine_kernel", combine)
    logits, rows = torch.zeros(4, VOCAB), torch.tensor([0, 2])
    half = torch.full((2,), 0.5)
    ContrastRows(2, VOCAB, "cpu", *asked)(logits, logits, rows, rows + 1, half, half)
    ((first_grid, _, first),), ((grid, _, second),) = best.first, combine.first
    chunk = OVERLAPPED_CHUNK if overlaps else CHUNK
    assert first_grid == grid == (2, -(-VOCAB // chunk), 1)
    assert "launch_pdl" not in first
    assert second["launch_pdl"] is overlaps
    for constants in (first, second):
        assert (constants["OVERLAP"], constants["CHUNK"]) == (overlaps, chunk)


def compile_contrast(kernel, overlap, monkeypatch, folder):
    """Return the compiled form of float32 logits, no GPU needed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    constants = {"CHUNKS": 32, "CHUNK": OVERLAPPED_CHUNK, "OVERLAP": overlap}
    constants = {name: constants[name] for name in kernel.arg_names if name.isupper()}
    options = {**contrast_triton._OPTIONS, "launch_pdl": overlap}
    return compile_for_hopper(kernel, constants, TYPES, options, aligned=False)


def about_memory(compiled):
    """Return what the program does to global memory, in its order."""
    return ABOUT_MEMORY.findall(compiled.asm["ptx"])


def test_rows_are_loaded_before_the_wait_and_written_after(monkeypatch, tmp_path):
    kernel = contrast_triton._combine_kernel
    compiled = compile_contrast(kernel, True, monkeypatch, tmp_path)
    assert compiled.metadata.launch_pdl
    found = about_memory(compiled)
    assert found.count(WAIT) == 1
    before, after = found[: found.index(WAIT)], found[found.index(WAIT) + 1 :]
    assert set(before) == {"ld.global"}
    # after it the best logits alone are loaded: at most one a thread for 25 chunks
    assert after.count("ld.global") == 1
    assert after.index("ld.global") == 0
    assert "st.global" in after


def test_the_first_launch_lets_the_second_begin_at_once(monkeypatch, tmp_path):
    kernel = contrast_triton._best_kernel
    compiled = compile_contrast(kernel, True, monkeypatch, tmp_path)
    assert about_memory(compiled)[0] == "griddepcontrol.launch_dependents"


@pytest.mark.parametrize("name", ["_best_kernel", "_combine_kernel"])
def test_plain_launches_know_nothing_of_it(monkeypatch, tmp_path, name):
    kernel = getattr(contrast_triton, name)
    compiled = compile_contrast(kernel, False, monkeypatch, tmp_path)
    assert "griddepcontrol" not in compiled.asm["ptx"]
    assert not compiled.metadata.launch_pdl
