# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from moe_tta.adapter import AdapterModel
from tests.adapter import independent

FAMILIES = ("mixtral", "olmoe", "qwen2_moe_whole", "qwen3_moe")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def adapter(tiny_models, family):
    return AdapterModel.from_checkpoint(tiny_models(family))


@pytest.fixture
def plain(tiny_models, family):
    return independent.load(tiny_models(family))


@pytest.fixture
def draw():
    """Draws from one seeded stream: draw.tokens(n), draw.normal(shape)."""
    generator = torch.Generator().manual_seed(11)

    class Draw:
        def tokens(self, count):
            return torch.randint(2, 256, (count,), generator=generator).tolist()

        def normal(self, *shape):
            return torch.randn(shape, generator=generator)

    return Draw()
