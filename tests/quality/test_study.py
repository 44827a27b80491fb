# SPDX-License-Identifier: Apache-2.0
"""The protocol: choose on one part, report another, go on after a kill."""

import argparse
import json

import numpy as np
import pytest

from benchmarks.quality import arms
from benchmarks.quality.__main__ import main, parser
from benchmarks.quality.arms import Arm
from benchmarks.quality.choices import ChoiceJudge
from benchmarks.quality.commands import COMMANDS, register
from benchmarks.quality.commands.contrast import PUBLISHED
from benchmarks.quality.engine import Engine
from benchmarks.quality.options import check_shared
from benchmarks.quality.plot import sweeps
from benchmarks.quality.report import dumps, nats_table, read_results, table
from benchmarks.quality.study import Answers
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.question import ChoiceQuestion
from benchmarks.quality.texts import sample_seed

PROBLEMS = [
    {"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(4)
]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        lines = "\n".join(map(json.dumps, PROBLEMS))
        (folder / f"{name}.jsonl").write_text(lines)
    return folder.parent


def answers(**right):
    by_arm = {Arm(name, name[0], {}): np.array(v, float) for name, v in right.items()}
    return Answers(TASKS["gsm8k"].tune, ("1", "2", "3"), {}, by_arm, {})


def test_the_best_of_a_family_the_first_of_equals():
    found = answers(a1=[0, 0, 1], a2=[1, 1, 0], a3=[0, 1, 1], b1=[1, 1, 1])
    assert found.best("a").name == "a2"
    assert found.best("b").name == "b1"


def test_contrast_arms_begin_with_the_most_cautious():
    found = arms.contrast([{"rank": 2}, {"k": 1}], [0.5, 0.1], [0.1])
    assert [(a.request["contrast"]["beta"], a.name) for a in found] == [
        (0.1, "contrast rank=2 beta=0.1 alpha=0.1"),
        (0.1, "contrast k=1 beta=0.1 alpha=0.1"),
        (0.5, "contrast rank=2 beta=0.5 alpha=0.1"),
        (0.5, "contrast k=1 beta=0.5 alpha=0.1"),
    ]


def test_samples_of_a_question_share_seeds_across_arms_only():
    seeds = {sample_seed(s, q, n) for s in (0, 1) for q in "ab" for n in (0, 1)}
    assert len(seeds) == 8
    assert sample_seed(0, "a", 0) == sample_seed(0, "a", 0)


def shared(**options):
    given = {"task": "gsm8k", "samples": 1, "temperature": 0.0}
    given |= {"run_code": False, "write_only": False}
    return argparse.Namespace(**{**given, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "mbpp"}, "mbpp runs generated programs: give --run-code"),
        ({"samples": 4}, "or more with --temperature above 0"),
        ({"samples": 0}, "expected --samples 1"),
        (
            {"task": "piqa", "samples": 2, "temperature": 1.0},
            "piqa is not sampled: expected --samples 1",
        ),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        check_shared(shared(**options))


def test_programs_may_be_written_where_they_are_not_run():
    check_shared(shared(task="mbpp", write_only=True))


def test_commands_are_registered_once():
    with pytest.raises(ValueError, match="'contrast' is registered twice"):
        register(COMMANDS["contrast"])


@pytest.mark.parametrize("weak", ["rank", "rank=two", "p=0.5"])
def test_weak_routings_are_checked(weak, capsys):
    given = ["contrast", "--model", "m", "--data", "d", "--task", "gsm8k"]
    with pytest.raises(SystemExit):
        parser().parse_args([*given, "--weak", weak])
    assert "expected rank=R or k=K" in capsys.readouterr().err


def test_contrast_on_a_real_engine(byte_model, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    command = (
        f"quality contrast --model {byte_model} --data {data} --task gsm8k --k-max 3 "
        f"--tune 2 --test 3 --weak rank=2 --beta 0.3,0.9 --fixed-k 1,3 --dtype float32 "
        f"--top-p 0.5 --max-tokens 6 --max-model-len 128 --max-num-seqs 8 --eager "
        f"--kv-gib 0.25 --samples 2 --temperature 1.0 "
        f"--work {tmp_path / 'work'} --out {out}"
    ).split()
    monkeypatch.setattr("sys.argv", command)
    assert main() == 0
    (result,) = read_results([out])
    tuned = {arm["name"]: arm for arm in result["tune"]["arms"]}
    tested = {arm["name"]: arm for arm in result["test"]["arms"]}
    assert len(tuned) == 6
    assert len(tested) == 5
    assert {"plain", "p=0.5", PUBLISHED.name} < set(tested)
    assert all(arm["n"] == 3 == len(arm["right"]) for arm in tested.values())
    assert all(1 <= arm["mean_tokens"] <= 6 for arm in tested.values())
    assert result["test"]["files"].keys() == {"gsm8k/test.jsonl"}
    assert str(tmp_path) not in out.read_text()
    assert capsys.readouterr().out.count("| gsm8k |") == 5

    journal = tmp_path / "work" / "contrast-tiny-gsm8k" / "test.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) == 1 + 5 * 3 * 2  # arms, questions, samples
    texts = {json.loads(line)[-1]["text"] for line in lines[1:]}
    assert len(texts) > 10  # arms and samples differ

    # everything is there: the same result without an engine
    monkeypatch.setattr(Engine, "run", None)
    assert main() == 0
    (again,) = read_results([out])
    assert (again["tune"], again["test"]) == (result["tune"], result["test"])


def test_a_request_the_model_cannot_honour_stops_before_anything_runs(
    byte_model, data, tmp_path, monkeypatch, capsys
):
    command = (
        f"quality contrast --model {byte_model} --data {data} --task gsm8k "
        f"--fixed-k 3 --work {tmp_path / 'work'}"
    )
    monkeypatch.setattr("sys.argv", command.split())
    assert main() == 1
    assert "k" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def result_of(task):
    right = {arms.PLAIN: np.array([0.0, 1, 1])}
    contrasts = arms.contrast([{"rank": 2}, {"k": 1}], [0.1, 0.5], [0.1])
    for index, arm in enumerate(contrasts):
        right[arm] = np.array([1.0, 1, index % 2])
    ids, files = ("1", "2", "3"), {"file": "hash"}
    answers = Answers(TASKS[task].tune, ids, files, right, {arm: {} for arm in right})
    found = answers.as_json(arms.PLAIN)
    return {
        "task": task,
        "reference": "plain",
        "conditions": {"flags": {"model": "tiny"}},
        "tune": found,
        "test": found,
    }


def test_the_file_is_json_with_a_line_for_each_arm():
    result = result_of("piqa")
    text = dumps(result)
    assert json.loads(text) == json.loads(json.dumps(result))
    assert sum('"name":' in line for line in text.splitlines()) == 2 * 5


def test_table_by_hand():
    lines = table([result_of("piqa")])
    assert lines[2].startswith("| piqa | plain | 3 | 0.667 (0.000, 1.000) |  |  |  |")
    assert "+0.000 (-1.000, +1.000) | 1, 1 | 1 |" in lines[3]
    assert len(lines) == 2 + 5


def test_nats_of_right_choices_by_hand():
    asked = [ChoiceQuestion(id, ("?",) * 2, ("a", "be"), 1) for id in ("1", "2")]
    arm = arms.PLAIN
    journal = {("plain", "1"): [-1.0, -1.0], ("plain", "2"): [-4.0, -2.0]}
    facts = ChoiceJudge(list, "raw").facts(asked, arm, journal)
    assert facts["gold_nats"] == [-1.0, -2.0]
    assert facts["share_nats"] == [-0.693, -0.127]  # -ln 2, -ln(1 + e^-2)
    assert (facts["accuracy_raw"], facts["accuracy_per_char"]) == (0.5, 1.0)


def test_nats_table_by_hand():
    arms_of = [{"name": "plain", "gold_nats": [-1.0, -3.0]}]
    arms_of.append({"name": "other", "gold_nats": [-1.5, -2.0]})
    result = {"task": "piqa", "reference": "plain", "test": {"arms": arms_of}}
    lines = nats_table([result], "gold_nats")
    assert lines[2:] == [
        "| piqa | plain | 2 | -2.000 |  |",
        "| piqa | other | 2 | -1.750 | +0.250 (-0.500, +1.000) |",
    ]
    with pytest.raises(ValueError, match="piqa has no share_nats"):
        nats_table([result], "share_nats")


def test_a_panel_for_each_task_and_a_line_for_each_weak_routing():
    figure = sweeps([result_of("piqa"), result_of("sciq")])
    assert [panel.get_title() for panel in figure.axes] == [
        "tiny, piqa, n = 3",
        "tiny, sciq, n = 3",
    ]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["plain", "rank=2, alpha 0.1", "k=1, alpha 0.1"]
