# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.quality.packing import Encoded, encode, pack, packs
from benchmarks.quality.tasks.question import ChoiceQuestion


def test_by_hand():
    # two choices share 1 2; the answers begin at index 2 and 1
    packed = pack(
        [Encoded(((1, 2, 3), (1, 2, 4, 5)), (2, 2)), Encoded(((6, 7),), (1,))]
    )
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert packed.positions.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert packed.predictors.tolist() == [1, 1, 3, 5]
    assert packed.targets.tolist() == [3, 4, 5, 7]
    assert packed.choice.tolist() == [0, 1, 1, 2]
    assert packed.sizes == (2, 1)
    sees = [torch.nonzero(row)[:, 0].tolist() for row in packed.visible[0, 0]]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5], [5, 6]]


def test_what_is_scored_is_never_shared():
    # equal first answer tokens stand once for each choice
    assert Encoded(((1, 2, 9), (1, 2, 9)), (1, 1)).shared == 1
    assert Encoded(((1, 2), (3, 2)), (1, 1)).shared == 0
    assert Encoded(((1, 2), (3, 2)), (1, 1)).num_tokens == 4


def test_packs_keep_order_and_budget():
    questions = [Encoded((tuple(range(n)),), (1,)) for n in (4, 4, 9, 2, 2, 2)]
    assert list(packs(questions, 8)) == [[0, 1], [2], [3, 4, 5]]
    assert list(packs([], 8)) == []


def test_encode(byte_model):
    tokenizer = Tokenizer.from_file(str(byte_model / "tokenizer.json"))
    question = ChoiceQuestion("0", ("Q: a", "Q: bb"), ("yes", "no"), 0)
    found = encode(tokenizer, question)
    assert [len(s) for s in found.sequences] == [8, 8]
    assert found.starts == (4, 5)
    assert found.shared == 3
    with pytest.raises(ValueError, match="question 1: choice"):
        encode(tokenizer, ChoiceQuestion("1", ("",), ("x",), 0))
