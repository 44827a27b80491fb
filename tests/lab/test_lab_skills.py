# SPDX-License-Identifier: Apache-2.0

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.lab import instructions, skills
from benchmarks.lab.generate import cut, generate
from benchmarks.lab.writers import in_vllm
from benchmarks.quality.sandbox import SandboxError, run_program

MODULE = '''
import math


class Circle:
    def area(self, radius):
        """The area."""
        square = radius**2
        return math.pi * square


def bare(x):
    return x


def only(x):
    """Nothing follows."""


def double(x: int) -> int:
    """Twice.

    >>> double(2)
    4
    """
    return 2 * x
'''
DOUBLE = (
    'def double(x: int) -> int:\n    """Twice.\n\n    >>> double(2)\n    4\n    """\n'
)


def test_functions_are_cut_after_their_docstring():
    found = dict(instructions.functions(MODULE))
    area = 'def area(self, radius):\n    """The area."""\n'
    assert found == {
        area: f"{area}    square = radius**2\n    return math.pi * square\n",
        DOUBLE: f"{DOUBLE}    return 2 * x\n",
    }


def test_modules_of_another_python_are_left_out():
    assert list(instructions.functions("print 'x'")) == []


def test_gsm8k_in_both_forms():
    row = {"question": "1 and 2?", "answer": "1+2=<<1+2=3>>3\n#### 3"}
    found = instructions.domains([row], [MODULE], "{}|{}".format)
    assert found["chat_gsm8k"] == ["1 and 2?|1+2=3\n#### 3"]
    assert found["qa_gsm8k"] == ["Question: 1 and 2?\nAnswer: 1+2=3\n#### 3\n\n"]
    task, _, answer = found["chat_python"][0].partition("|")
    assert task.endswith(f"```python\n{DOUBLE}```")
    assert answer == f"```python\n{found['functions'][0]}```"


@pytest.fixture
def words():
    vocabulary = {f"w{i}": i for i in range(62)} | {"<pad>": 62, "[UNK]": 63}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def test_texts_of_a_batch_are_those_of_each_prompt_alone(tiny_qwen, words):
    prompts = ["w1 w2 w3 w4 w5 w6", "w9", "w3 w1 w7"]
    options = {"stop": (), "max_tokens": 12}
    together = generate(tiny_qwen, words, prompts, batch=3, **options)
    alone = [generate(tiny_qwen, words, [p], batch=1, **options)[0] for p in prompts]
    assert together == alone
    assert len(set(together)) == 3


def test_a_stop_string_ends_a_text(tiny_qwen, words):
    whole = generate(tiny_qwen, words, ["w1 w2"], (), 64, batch=1)[0]
    stop = whole.split()[4]
    found = generate(tiny_qwen, words, ["w1 w2"], (stop,), 64, batch=1)[0]
    assert found == cut(whole, (stop,))
    assert cut("a\n\nb\ndef", ("\ndef", "\n\n")) == "a"
    assert cut("a", ("\ndef",)) == "a"


def test_vllm_runs_the_learned_routing_only(tmp_path):
    with (
        pytest.raises(ValueError, match="learned routing here, not random"),
        in_vllm(tmp_path, "random", 1),
    ):
        pass


@pytest.fixture
def data(tmp_path):
    """Two problems of GSM8K and one of HumanEval."""
    for folder in ("gsm8k", "humaneval"):
        (tmp_path / folder).mkdir()
    problems = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(6)]
    for split in ("train", "test"):
        lines = "\n".join(map(json.dumps, problems))
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(lines)
    problem = {
        "task_id": "HumanEval/0",
        "prompt": DOUBLE,
        "test": "def check(f):\n    assert f(3) == 6\n",
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
    }
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text(json.dumps(problem))
    return tmp_path


def test_answers_are_judged_against_the_dense_models(data, monkeypatch):
    try:
        run_program("pass", timeout_s=60.0)
    except SandboxError as err:
        pytest.skip(str(err))
    code = {"right": "\n    return 2 * x\n", "wrong": "\n    return x\n"}
    answers = {}
    for label, total, program in (("dense", 3, "wrong"), ("moe, learned", 6, "right")):
        texts = {f"test/{i}": f"#### {2 * i if i < total else 99}" for i in range(6)}
        answers[label] = {
            "gsm8k": {"seconds": 1.0, "texts": texts},
            "humaneval": {"seconds": 1.0, "texts": {"HumanEval/0": code[program]}},
        }
    (data / "texts.json").write_text(json.dumps({"conditions": {}, "answers": answers}))
    line = ["skills", "judge", "texts.json", "--data", ".", "--out", "skills.json"]
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.chdir(data)
    skills.main()
    results = json.loads((data / "skills.json").read_text())["results"]
    assert results["dense"]["gsm8k"]["accuracy"]["mean"] == 0.5
    assert results["moe, learned"]["gsm8k"]["minus_dense"]["mean"] == 0.5
    assert results["dense"]["humaneval"]["accuracy"]["mean"] == 0.0
    assert results["moe, learned"]["humaneval"]["accuracy"]["mean"] == 1.0


def test_both_parts_of_humaneval_are_asked(data):
    found = skills.questions(skills.TASKS["humaneval"], data, None)
    assert [question.id for question in found] == ["HumanEval/0"]
    sample = skills.questions(skills.TASKS["gsm8k"], data, 2)
    assert len(sample) == 2
    assert sample[0].prompt.count("Question:") == 1 + skills.SHOTS["gsm8k"]


@torch.inference_mode()
def test_asking_writes_texts_of_every_run(data, tiny_qwen, words, monkeypatch):
    from moe_tta.lab.architectures import QWEN2_MOE

    from .test_lab_upcycle import built, neutral_factors, weights

    tiny_qwen.save_pretrained(data / "dense")
    for folder in ("dense", "moe"):
        words.save_pretrained(data / folder)
    factors = neutral_factors(tiny_qwen.config.to_dict(), 8)
    built(weights(tiny_qwen), factors, QWEN2_MOE, data / "moe")
    options = [
        "--data",
        ".",
        "--out",
        "texts.json",
        "--limit",
        "2",
        "--max-tokens",
        "4",
    ]
    line = ["skills", "ask", "--dense", "dense", "--moe", "moe", *options]
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.chdir(data)
    skills.main()
    answers = json.loads((data / "texts.json").read_text())["answers"]
    assert list(answers) == ["dense", "moe, learned", "moe, random"]
    for tasks in answers.values():
        assert len(tasks["gsm8k"]["texts"]) == 2
        assert list(tasks["humaneval"]["texts"]) == ["HumanEval/0"]
