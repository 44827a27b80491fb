# SPDX-License-Identifier: Apache-2.0
"""On a GPU: rows of slot 0 equal vLLM's `topk_softmax` bit for bit.

Needs vLLM for CUDA, or its routing library: MOE_C=FILE.so.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from benchmarks.kernel.stock import MODELS, compare, find_stock

STOCK = find_stock()
pytestmark = pytest.mark.skipif(STOCK is None, reason="needs vLLM's _moe_C")


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_slot_0_is_stock(model):
    findings = list(compare(STOCK, model, (1, 33, 1024)))
    assert findings
    assert [found for found in findings if found.ids or found.weights] == []
