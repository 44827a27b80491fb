# SPDX-License-Identifier: Apache-2.0
"""Launches that begin before the one they follow ends: nothing is touched too early."""

import re
from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")
from moe_tta.kernels import route, used_sum
from moe_tta.kernels.route import RoutingKernel
from moe_tta.kernels.route_row import route_rows
from moe_tta.kernels.scores import RoutingRule
from tests.kernels.cases import make_shape, make_table
from tests.kernels.hopper import compile_for_hopper

WAIT = "griddepcontrol.wait"
ABOUT_MEMORY = re.compile(r"griddepcontrol\.\w+|(?:ld|st)\.global")
POINTERS = defaultdict(
    lambda: "fp32",
    logits_ptr="bf16",
    plans_ptr="u8",
    positions_ptr="i64",
    padding_ptr="i1",
    expert_outputs_ptr="bf16",
    output_ptr="bf16",
)
POINTERS |= dict.fromkeys(("ids_ptr", "slots_ptr", "given_ids_ptr"), "i32")
POINTERS["topk_ids_ptr"] = "i32"


def routing(rows, lanes):
    """Return the routing kernel's constants, as for a GPU."""
    shape = make_shape(num_experts=64, top_k=8)
    kernel = RoutingKernel(
        make_table(shape).layer(0), RoutingRule.from_shape(shape), 8, 0
    )
    return kernel._all_constants(rows, lanes, torch.bfloat16, True, False)


def summing():
    """Return the sum's constants, as for a GPU."""
    device = torch.device("cuda", 0)
    return used_sum._constants(2048, 8, True, (16384, 2048, 1), device)


CASES = {
    "row": (route_rows, lambda: routing(1, 0)),
    "runs": (route_rows, lambda: routing(8, 4)),
    "sum": (used_sum._sum_used_columns, summing),
}


@pytest.fixture(params=CASES)
def compiled(request, monkeypatch, tmp_path):
    """Return a function from `overlap` to a kernel's form for Hopper."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = CASES[request.param]

    def compiled(overlap):
        for module in (route, used_sum):
            monkeypatch.setattr(module, "can_overlap", lambda *_: overlap)
        monkeypatch.setattr(route, "is_nvidia", lambda *_: True)
        options = constants()
        named = {name: options.pop(name) for name in [*options] if name.isupper()}
        return compile_for_hopper(kernel, named, POINTERS, options)

    return compiled


def test_nothing_is_touched_before_the_wait(compiled):
    found = compiled(overlap=True)
    assert found.metadata.launch_pdl
    touched = ABOUT_MEMORY.findall(found.asm["ptx"])
    assert touched[0] == WAIT
    assert touched.count(WAIT) == 1
    assert {"ld.global", "st.global"} <= set(touched)


def test_other_devices_know_nothing_of_it(compiled):
    found = compiled(overlap=False)
    assert "griddepcontrol" not in found.asm["ptx"]
    assert not found.metadata.launch_pdl
