# SPDX-License-Identifier: Apache-2.0
"""Reading the data sets' own formats, and who is tuned on."""

import gzip
import hashlib
import json

import pyarrow
import pytest

from benchmarks.quality.tasks import (
    TASKS,
    DataError,
    find_task,
    load,
    worked_examples,
)
from benchmarks.quality.tasks.question import Part, worked


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_requests(path, requests):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.write("\n".join(map(json.dumps, requests)))


def olmes_request(doc_id, idx, continuation, context="Question: why?\nAnswer:", **doc):
    request = {"context": "Worked\nAnswer: x\n\n" + context}
    request["continuation"] = f" {continuation}"
    return {"doc_id": doc_id, "idx": idx, "doc": doc, "label": 1, "request": request}


def test_olmes(tmp_path):
    task = TASKS["arc_easy"]
    docs = [
        olmes_request(7, 1, "cat", gold=1),
        olmes_request(7, 0, "dog", gold=1),
        olmes_request(1_000_007, 0, "dog", context="Answer:", gold=1),
    ]
    path = tmp_path / task.test.files
    write_requests(path, docs)
    (found,), files = load(task, task.test, tmp_path, 0, None, 0)
    assert found.choices == ("dog", "cat")
    assert found.contexts == ("Question: why?\nAnswer:",) * 2
    assert (found.id, found.gold) == ("7", 1)
    assert files == {task.test.files: hashlib.sha256(path.read_bytes()).hexdigest()}
    (few,), _ = load(task, task.test, tmp_path, 5, None, 0)
    assert few.contexts[0].startswith("Worked\nAnswer: x\n\nQuestion")
    with pytest.raises(DataError, match="does not have 3 worked examples"):
        load(task, task.test, tmp_path, 3, None, 0)


def test_winogrande_has_a_context_for_each_choice(tmp_path):
    task = TASKS["winogrande"]
    docs = [
        olmes_request(0, i, "ran.", context=f"A saw B so {name}")
        for i, name in enumerate("AB")
    ]
    write_requests(tmp_path / task.tune.files, docs)
    (found,), _ = load(task, task.tune, tmp_path, 0, None, 0)
    assert found.contexts == ("A saw B so A", "A saw B so B")
    assert found.choices == ("ran.", "ran.")
    assert found.gold == 1


def test_mmlu(tmp_path):
    task = TASKS["mmlu"]
    for split, question in (("test", "What?"), ("dev", "Who?")):
        part = tmp_path / task.test.files.replace("*", "law", 1).replace("test", split)
        path = part.with_name("data-0.arrow")
        path.parent.mkdir(parents=True)
        rows = pyarrow.table(
            {"question": [question], "choices": [["a", "b", "c", "d"]], "answer": [2]}
        )
        with pyarrow.ipc.new_stream(str(path), rows.schema) as stream:
            stream.write_table(rows)
    asked = "What?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    (found,), _ = load(task, task.test, tmp_path, 0, None, 0)
    assert (found.id, found.contexts[3], found.gold) == ("law/0", asked, 2)
    (few,), _ = load(task, task.test, tmp_path, 1, None, 0)
    assert few.contexts[0] == f"{asked.replace('What', 'Who')} C\n\n{asked}"
    with pytest.raises(DataError, match="law has 1 worked examples, not 5"):
        load(task, task.test, tmp_path, 5, None, 0)


def test_strategyqa(tmp_path):
    rows = [
        {"qid": "x", "question": "Is it?", "answer": True, "facts": ["So.", "Then."]},
        {"qid": "y", "question": "Was it?", "answer": False, "facts": []},
    ]
    write(tmp_path / "strategyqa/train.json", json.dumps(rows))
    task = TASKS["strategyqa"]
    found, _ = load(task, task.tune, tmp_path, 0, None, 0)
    assert [q.choices[q.gold] for q in found] == ["yes", "no"]
    text = TASKS["strategyqa_text"]
    (one,), _ = load(text, text.tune, tmp_path, 1, None, 0)
    assert one.gold == "no"
    assert one.prompt == (
        "Question: Is it?\nAnswer: So. Then. So the answer is yes.\n\n"
        "Question: Was it?\nAnswer:"
    )


def test_gsm8k(tmp_path):
    rows = [
        {"question": f"{n}?", "answer": f"1+1=<<1+1=2>>2\n#### {n},000"}
        for n in range(3)
    ]
    lines = "\n".join(map(json.dumps, rows))
    write(tmp_path / "gsm8k/train.jsonl", lines)
    write(tmp_path / "gsm8k/test.jsonl", lines)
    task = TASKS["gsm8k"]
    test, _ = load(task, task.test, tmp_path, 1, None, 0)
    assert [q.gold for q in test] == ["0000", "1000", "2000"]
    assert test[0].prompt == (
        "Question: 0?\nAnswer: 1+1=2\n#### 0,000\n\nQuestion: 0?\nAnswer:"
    )
    tune, _ = load(task, task.tune, tmp_path, 1, None, 0)
    assert [q.id for q in tune] == ["train/1", "train/2"]  # 0 is the worked example


@pytest.mark.parametrize(
    ("name", "end", "begin"), [("humaneval", "", "\n"), ("humaneval_newline", "\n", "")]
)
def test_humaneval_programs(tmp_path, name, end, begin):
    row = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "entry_point": "f"}
    row["test"] = "def check(c):\n    assert c(1) == 2\n"
    row["canonical_solution"] = "    return x + 1\n"
    write(tmp_path / "humaneval/HumanEval.jsonl", json.dumps(row))
    task = TASKS[name]
    found = [
        question
        for part in (task.tune, task.test)
        for question in load(task, part, tmp_path, 0, None, 0)[0]
    ]
    (question,) = found  # in one of the two parts
    assert question.prompt == "def f(x):" + end
    assert question.solution == begin + "    return x + 1"
    program = question.gold.replace("{completion}", question.solution)
    exec(program, {})
    with pytest.raises(AssertionError):
        exec(question.gold.replace("{completion}", begin + "    return x"), {})


def test_both_ends_of_humaneval_ask_the_same_questions():
    bare, newline = TASKS["humaneval"], TASKS["humaneval_newline"]
    assert (bare.tune, bare.test) == (newline.tune, newline.test)
    assert bare.stop == newline.stop


def test_worked_examples_are_the_first_of_the_tuning_part(tmp_path):
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(4)]
    for name in ("train", "test"):
        lines = "\n".join(map(json.dumps, rows))
        write(tmp_path / f"gsm8k/{name}.jsonl", lines)
    task = TASKS["gsm8k"]
    examples = worked_examples(task, tmp_path, 2)
    plain, _ = load(task, task.test, tmp_path, 0, None, 0)
    shots, _ = load(task, task.test, tmp_path, 2, None, 0)
    # as --shots writes them
    assert [worked(examples) + q.prompt for q in plain] == [q.prompt for q in shots]
    shown = {example.id for example in examples}
    tune, _ = load(task, task.tune, tmp_path, 0, 2, 0, shown)
    assert [q.id for q in tune] == ["train/2", "train/3"]
    with pytest.raises(DataError, match="gsm8k has 4 worked examples, not 5"):
        worked_examples(task, tmp_path, 5)
    with pytest.raises(DataError, match="piqa is multiple choice"):
        worked_examples(TASKS["piqa"], tmp_path, 1)


def test_worked_mbpp(tmp_path):
    doc = {"task_id": 11, "code": "def f(x):\r\n  return x\r\n", "test_setup_code": ""}
    doc["test_list"] = ["assert f(1) == 1"]
    request = {"doc": doc, "request": {"context": "Write f.\n```python\n"}}
    task = TASKS["mbpp"]
    write_requests(tmp_path / task.test.files, [request])
    (question,) = [
        question
        for part in (task.tune, task.test)
        for question in load(task, part, tmp_path, 0, None, 0)[0]
    ]
    assert worked([question]) == ("Write f.\n```python\ndef f(x):\n  return x\n```\n\n")


def test_math500(tmp_path):
    doc = {"index": 3, "problem": "What is $1/2$?", "solution": "It is $\\boxed{.5}$."}
    task = TASKS["math500"]
    write_requests(tmp_path / task.test.files, [{"doc": doc}])
    (question,) = [
        question
        for part in (task.tune, task.test)
        for question in load(task, part, tmp_path, 0, None, 0)[0]
    ]
    assert question.prompt == "Problem:\nWhat is $1/2$?\n\nSolution:"
    assert question.gold == task.extract(question.solution) == "0.5"


def test_parts_of_one_split_share_the_questions_out():
    low, high = Part("test", "", 0, 0.3), Part("test", "", 0.3, 1)
    ids = [str(n) for n in range(2000)]
    assert all(low.holds(i) != high.holds(i) for i in ids)
    share = sum(map(low.holds, ids)) / 2000
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_no_task_is_tuned_on_what_it_reports(task):
    tune, test = task.tune, task.test
    assert tune.files != test.files or tune.high <= test.low


def test_a_sample_is_repeatable_and_grows(tmp_path):
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(50)]
    write(tmp_path / "gsm8k/test.jsonl", "\n".join(map(json.dumps, rows)))
    task = TASKS["gsm8k"]

    def ids(limit, seed):
        return [q.id for q in load(task, task.test, tmp_path, 0, limit, seed)[0]]

    assert ids(10, 0) == ids(10, 0) != ids(10, 1)
    assert set(ids(10, 0)) < set(ids(20, 0))
    assert ids(10, 0) == sorted(ids(10, 0), key=lambda i: int(i[5:]))
    assert len(ids(99, 0)) == 50


def test_what_is_missing_is_named(tmp_path):
    task = TASKS["gsm8k"]
    with pytest.raises(
        DataError, match=r"gsm8k needs gsm8k/test.jsonl in .*quality.md"
    ):
        load(task, task.test, tmp_path, 0, None, 0)
    with pytest.raises(DataError, match=r"expected one of arc_easy, .*, got 'arc'"):
        find_task("arc")
