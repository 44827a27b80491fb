# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.overhead`: its arithmetic, its plans, and one round on real engines."""

import json
import subprocess
import sys

import pytest

from benchmarks.overhead import record, serve
from benchmarks.overhead.__main__ import parser
from benchmarks.overhead.engines import split
from benchmarks.overhead.models import CONFIGS, Model
from benchmarks.overhead.modes import ENGINE_OF, MODES, engine_kind, requests
from benchmarks.overhead.processes import ROOT
from benchmarks.overhead.ratios import agreement, interval, lines, summarise
from benchmarks.overhead.record import ResultFile, read_runs
from benchmarks.overhead.servers import client_args, server_args
from benchmarks.overhead.tokenizer import servable
from moe_tta import RouterShape
from moe_tta.compile import compile_request
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext
from tests.tiny import COMMON
from tests.tiny import CONFIGS as TINY

SHAPE = RouterShape(
    layers=(0, 1), num_hidden_layers=2, num_experts=64, top_k=8, k_max=8
)


def sample(mode, number, seconds, **more):
    cell = {"group": 0, "measure": "decode", "size": "8", **more}
    return {"mode": mode, "round": number, "seconds": seconds, **cell}


def plans(mode, serial, count=3):
    compiled = [
        compile_request(parse(given, presets={}), PlanContext(SHAPE, {}))
        for given in requests(mode, SHAPE, count, serial)
    ]
    return [c.plans[0].fingerprint for c in compiled if not c.neutral]


@pytest.fixture
def config_only(tmp_path):
    """A folder with a config and nothing else: random weights, no tokenizer."""
    config = {**COMMON, **TINY["olmoe"], "num_hidden_layers": 2, "model_type": "olmoe"}
    config["architectures"] = ["OlmoeForCausalLM"]
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_commit_is_gits_or_what_a_host_without_it_was_told(monkeypatch, tmp_path):
    by_git = record._commit()
    monkeypatch.setenv("MOE_TTA_COMMIT", "told")
    if by_git is not None:
        assert record._commit() == by_git
    monkeypatch.setattr(record, "ROOT", tmp_path)  # no repository
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record._commit() == "told"
    monkeypatch.setenv("PATH", "")  # no git
    assert record._commit() == "told"
    monkeypatch.delenv("MOE_TTA_COMMIT")
    assert record._commit() is None


def test_ratios_are_taken_within_a_round():
    # stock drifts by a factor of 100; the mode costs 10, 20 and 30 %
    samples = [sample("stock", n, s) for n, s in ((1, 1.0), (2, 10.0), (3, 100.0))]
    samples += [sample("idle", n, s) for n, s in ((1, 1.1), (2, 12.0), (3, 130.0))]
    stock, idle = summarise(samples)
    assert (stock["mode"], stock["ratio"]) == ("stock", 1)
    assert idle["ratio"] == pytest.approx(1.2)
    assert idle["seconds"] == 12.0
    assert idle["low"] == pytest.approx(1.1)
    assert idle["high"] == pytest.approx(1.3)
    assert idle["rounds"] == 3


def test_groups_of_engines_have_a_stock_of_their_own():
    samples = [sample("stock", 1, 1.0), sample("stock", 1, 4.0, group=1)]
    samples += [sample("k-max", 1, 6.0, group=1)]
    assert summarise(samples)[-1]["ratio"] == 1.5


def test_rows_are_in_order_of_size():
    samples = [sample("stock", 1, 1.0, size=size) for size in ("64", "8", "256")]
    assert [row["size"] for row in summarise(samples)] == ["8", "64", "256"]


def test_no_ratio_without_a_time_of_stock():
    row = summarise([sample("stock", 1, 0.0), sample("idle", 1, 1.0)])[1]
    assert (row["ratio"], row["low"], row["rounds"]) == (None, None, 0)
    assert "x" not in lines([row])[-1]


def test_the_interval_holds_the_median():
    low, high = interval([1.0, 1.1, 1.2, 1.3, 5.0])
    assert 1.0 <= low <= 1.2 <= high <= 5.0
    assert interval([2.0]) == (2.0, 2.0)


def test_agreement_counts_batches_with_stock_s_tokens():
    samples = [sample(m, 1, 1.0, digest="a") for m in ("stock", "idle", "half-k")]
    samples += [sample("stock", 2, 1.0, digest="a"), sample("idle", 2, 1.0, digest="b")]
    assert agreement(samples) == {"idle": (1, 2)}


def test_plans_differ_as_the_modes_say():
    assert len(set(plans("all-same", 1))) == 1
    assert len(set(plans("all-distinct", 1))) == 3
    assert not set(plans("all-distinct", 1)) & set(plans("all-distinct", 2))
    assert len(set(plans("half-k", 1) + plans("half-k", 2))) == 1
    for mode in ("stock", "stock-again", "idle", "k-max"):
        assert requests(mode, SHAPE, 2, 1) == [None, None]


def test_engines_share_the_device_as_far_as_they_fit():
    kinds = ["stock", "plugin", "wide"]
    assert split(kinds, 20, 100) == [kinds]
    assert split(kinds, 40, 100) == [["stock", "plugin"], ["stock", "wide"]]
    assert split(["stock"], 40, 100) == [["stock"]]
    with pytest.raises(ValueError, match="do not fit"):
        split(kinds, 60, 100)


@pytest.mark.parametrize("name", [path.name for path in CONFIGS.iterdir()])
def test_built_in_models(name):
    model = Model.find(name)
    assert (model.name, model.load_format) == (name, "dummy")
    assert model.shape.top_k == 8


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="olmoe"):
        Model.find("no-such-model")


@pytest.mark.parametrize(
    ("option", "said"),
    [("--modes", "expected some of stock"), ("--batch", "1,8"), ("--prefill", "8x128")],
)
def test_bad_options_are_named_with_what_was_expected(capsys, option, said):
    with pytest.raises(SystemExit):
        parser().parse_args([option, "eight"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert option in message
    assert said in message
    assert "eight" in message


def test_results_are_added_and_rewritten(tmp_path):
    path = tmp_path / "a" / "out.json"
    ResultFile(path).write({"run": 1})
    file = ResultFile(path)
    file.write({"run": 2})
    file.write({"run": 3})
    assert read_runs(path) == [{"run": 1}, {"run": 3}]


def test_any_ids_survive_the_made_tokenizer(config_only, tmp_path):
    from transformers import AutoTokenizer

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(
        servable(Model.find(str(config_only)), scratch)
    )
    ids = [2, 255, 17, 2, 2]
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids


def test_vllm_knows_the_servers_and_the_client_s_options(config_only, tmp_path):
    from vllm.benchmarks.serve import add_cli_args
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    model = Model.find(str(config_only))
    args = serve.parser().parse_args([])
    options = serve.server_options(args, model, config_only)
    kind = engine_kind("plugin", model.shape)
    words = server_args(kind, 1, options)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    assert parsed.additional_config == {"moe_tta": {"allow_inline": True}}
    assert parsed.enable_prefix_caching is False
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = serve.client_options(args, 5, 10)
    parsed = parser.parse_args(client_args("http://x", tmp_path, options, {"a": 1}))
    assert (parsed.seed, parsed.request_rate, parsed.extra_body) == (5, 16, {"a": 1})


def test_one_round_of_every_mode(config_only, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.overhead", "--model", config_only]
    command += ["--batch", "1,3", "--prefill", "2x40", "--steps", "4", "--repeat", "1"]
    command += ["--dtype", "float32", "--eager", "--budget", "1", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = read_runs(out)
    found = {(s["mode"], s["measure"], s["size"]) for s in run["samples"]}
    measures = [("decode", "1"), ("decode", "3"), ("prefill", "2x40")]
    measures += [("prefill-new", "2x40"), ("admit", "3")]
    assert found >= {(m, *rest) for m in (*MODES, "stock-again") for rest in measures}
    assert all(s["seconds"] > 0 for s in run["samples"])
    assert run["summary"] == summarise(run["samples"])
    (group,) = run["groups"]
    assert {kind: facts["armed_layers"] for kind, facts in group.items()} == {
        "stock": 0,
        "plugin": 2,
        "wide": 2,
    }
    assert set(group) == set(ENGINE_OF.values())
    # same batches, same process shape: what carries no plan must not change a token
    assert run["tokens_equal_stock"] == {
        mode: [3, 3] for mode in ("stock-again", "idle", "k-max")
    }
    assert run["conditions"]["weights"] == "random"
    assert str(tmp_path) not in out.read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
