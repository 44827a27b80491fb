# SPDX-License-Identifier: Apache-2.0
"""Every update scores on a GPU what it scores on the CPU. Needs the extra `remix`.

Sums have another order there. The bound is that of test_remix_scores.py: twice what
float32 does to these very scores on the CPU, and the rounding of an answer's tokens.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.quality.__main__ import parser
from benchmarks.quality.remix.batch import Batch
from benchmarks.quality.remix.methods import all_methods
from benchmarks.quality.remix.nearness import nearness
from benchmarks.quality.remix.study import open_study
from benchmarks.quality.remix.variants import variants
from benchmarks.quality.tasks import TASKS, load
from moe_tta.adapter import AdapterModel
from tests.quality.conftest import byte_model as byte_model
from tests.quality.test_remix import command
from tests.quality.test_remix import data as data
from tests.quality.test_remix_scores import bound_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def batches(byte_model, data, tmp_path_factory):
    """The same questions and store, by device and dtype."""
    work = tmp_path_factory.mktemp("work")
    args = parser().parse_args(command(byte_model, data, work, work / "out")[1:])
    task = TASKS["arc_easy"]
    study = open_study(args, task)
    questions = load(task, task.test, data, 0, None, 0)[0]
    kinds = {
        "cpu": ("cpu", torch.float32),
        "exact": ("cpu", torch.float64),
        "cuda": ("cuda", torch.float32),
    }
    return {
        name: Batch(
            replace(
                study, model=AdapterModel.from_checkpoint(byte_model, dtype, device)
            ),
            questions,
        )
        for name, (device, dtype) in kinds.items()
    }


@pytest.mark.parametrize("kind", ["methods", "variants"])
def test_scores_are_the_cpus(batches, kind):
    def scores(batch):
        every = all_methods(8, 3, 1e-2)
        if kind == "variants":
            every = variants(batch.study, 3, 1e-2)
        return {arm.name: method(batch) for arm, method in every.items()}

    found = {name: scores(batch) for name, batch in batches.items()}
    steep = ("lr=0.1", "lr=1.0", "lr=10.0")  # rounding grows with the rate
    for arm in found["cuda"]:
        if arm.endswith(steep):
            continue
        for place, question in enumerate(batches["cuda"].questions):
            exact, own, here = (
                torch.tensor(found[name][arm][place], dtype=torch.float64)
                for name in ("exact", "cpu", "cuda")
            )
            apart = (here - exact).abs()
            assert (apart <= bound_of(exact, own, question)).all(), arm


def test_nearness_is_the_cpus(batches):
    for here, there in zip(
        nearness(batches["cuda"]), nearness(batches["cpu"]), strict=True
    ):
        assert here.kept == there.kept
        assert abs(here.moved - there.moved) <= 1e-6
