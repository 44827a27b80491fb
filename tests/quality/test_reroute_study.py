# SPDX-License-Identifier: Apache-2.0
"""The command reroute: its arms, its engine, what it keeps of rounds."""

import json

import pytest
import torch

from benchmarks.quality import arms
from benchmarks.quality.__main__ import main, parser
from benchmarks.quality.commands.reroute import PUBLISHED, check_options
from benchmarks.quality.engine import Engine
from benchmarks.quality.report import read_results

PROBLEMS = [
    {"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(5)
]
STILL = "reroute lr=0.0,steps=1,every=8,share=0.5,sign=1,mode=wait"
MOVED = "reroute lr=0.5,steps=1,every=8,share=0.5,sign=1,mode=wait"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """More threads only wait for each other on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "gsm8k").mkdir()
    for name in ("train", "test"):
        lines = "\n".join(map(json.dumps, PROBLEMS))
        (folder / f"gsm8k/{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def run(byte_model, data):
    """Runs the command: run(folder, more options) -> exit status."""

    def run(folder, *more):
        command = (
            f"quality reroute --model {byte_model} --data {data} --task gsm8k "
            f"--tune 2 --test 3 --lr 0,0.5 --steps 1 --every 8 --sign 1 "
            f"--in-context 2 --vote 2 --dtype float32 --max-tokens 12 "
            f"--max-model-len 160 --max-num-seqs 8 --eager --kv-gib 0.25 "
            f"--work {folder / 'work'} --out {folder / 'out.json'}"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [*command.split(), *more])
            return main()

    return run


@pytest.fixture(scope="module")
def at_once(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("once")
    assert run(folder) == 0
    return folder


def journal_of(folder, part):
    file = folder / "work" / "reroute-tiny-gsm8k" / f"{part}.jsonl"
    lines = map(json.loads, file.read_text().splitlines()[1:])
    return {tuple(key): outcome for *key, outcome in lines}


def without_times(result):
    """A result's parts, but for the worker's milliseconds."""
    parts = json.loads(json.dumps([result["tune"], result["test"]]))
    for arm in [arm for part in parts for arm in part["arms"]]:
        arm.get("rounds", {}).pop("milliseconds", None)
    return parts


def test_on_a_real_engine(run, at_once, monkeypatch):
    (result,) = read_results([at_once / "out.json"])
    tuned = {arm["name"]: arm for arm in result["tune"]["arms"]}
    tested = {arm["name"]: arm for arm in result["test"]["arms"]}
    baselines = ["plain", "in context 2", "vote of 2 at 0.7"]
    assert list(tuned) == [*baselines, STILL, MOVED]
    assert list(tested)[:3] == baselines
    assert list(tested)[-1] == PUBLISHED.name
    assert tuned["in context 2"]["examples"] == ["train/0", "train/1"]
    assert set(result["tune"]["ids"]) <= {"train/2", "train/3", "train/4"}

    outcomes = journal_of(at_once, "tune")
    ids = result["tune"]["ids"]

    def texts(name):
        return [outcomes[(name, id, 0)]["text"] for id in ids]

    assert texts(STILL) == texts("plain") != texts(MOVED)
    assert texts("in context 2") != texts("plain")
    assert sum(key[0] == "vote of 2 at 0.7" for key in outcomes) == 2 * 2
    for name in (STILL, MOVED):
        check_rounds(tuned[name], [outcomes[(name, id, 0)] for id in ids])
    assert "rounds" not in tuned["plain"]
    assert tuned[STILL]["rounds"]["fallen"] == 0

    # everything is there: the same result without an engine
    monkeypatch.setattr(Engine, "run", None)
    assert run(at_once) == 0
    (again,) = read_results([at_once / "out.json"])
    assert (again["tune"], again["test"]) == (result["tune"], result["test"])


def check_rounds(arm, outcomes):
    """A round on the prompt, another after 8 of 12 tokens, as the journal says."""
    for outcome in outcomes:
        contexts = [report["context"] for report in outcome["rounds"]]
        end = outcome["prompt_tokens"]
        assert contexts == ([end] if outcome["tokens"] <= 8 else [end, end + 8])
    reports = [report for outcome in outcomes for report in outcome["rounds"]]
    found = arm["rounds"]
    assert found["outcomes"] == {"adapted": len(reports)}
    assert (found["texts"], found["adapted"]) == (2, 2)
    assert found["rounds"] == len(reports)
    assert found["token_steps"] == sum(report["context"] for report in reports) / 2
    assert arm["mean_prompt_tokens"] == sum(o["prompt_tokens"] for o in outcomes) / 2


def test_written_here_and_judged_later_is_the_same(
    run, at_once, tmp_path, monkeypatch, capsys
):
    assert run(tmp_path, "--write-only") == 0
    assert not (tmp_path / "out.json").exists()
    assert "judge without --write-only" in capsys.readouterr().out
    written = journal_of(tmp_path, "test")
    assert {key[0] for key in written} >= {STILL, MOVED, PUBLISHED.name}
    monkeypatch.setattr(Engine, "run", None)
    assert run(tmp_path) == 0
    (later,) = read_results([tmp_path / "out.json"])
    (once,) = read_results([at_once / "out.json"])
    assert without_times(later) == without_times(once)
    assert later["written_by"]["flags"]["write_only"] is True
    assert "written_by" not in once
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()


def test_arms_begin_with_the_most_cautious():
    swept = {"lr": [0.2, 0.05], "steps": [5], "every": [32, 0, 128], "share": [0.5]}
    found = arms.reroute({**swept, "sign": [1], "mode": ["wait"]})
    settings = [arm.request["reroute"] for arm in found]
    assert [(s["lr"], s["every"]) for s in settings] == [
        *[(0.05, 0), (0.05, 128), (0.05, 32)],
        *[(0.2, 0), (0.2, 128), (0.2, 32)],
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gsm8k --in-context 2 --shots 2", "expected --in-context or --shots"),
        ("gsm8k --in-context 0", "expected --in-context 1 or more"),
        ("gsm8k --vote 1", "expected --vote 2 or more"),
        ("mbpp --vote 5 --run-code", "mbpp is answered by programs"),
    ],
)
def test_options_that_contradict_each_other(given, message):
    args = f"reroute --model m --data d --task {given}".split()
    with pytest.raises(ValueError, match=message):
        check_options(parser().parse_args(args))


def test_prompts_that_are_too_long_stop_before_anything_runs(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Engine, "run", None)
    # byte tokens; the longest prompt is a question after two worked examples
    head, solution = "Question: What is 0 + 0?\nAnswer:", " #### 0\n\n"
    longest = 3 * len(head) + 2 * len(solution)
    assert run(tmp_path, "--max-model-len", str(longest)) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"expected --max-model-len above {longest}, " in message
    assert "'in context 2'" in message
    assert journal_of(tmp_path, "tune") == {}
