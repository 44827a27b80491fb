# SPDX-License-Identifier: Apache-2.0
import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from moe_tta import lab
from moe_tta.cli import app
from moe_tta.spec import parse
from moe_tta.strategies import STRATEGIES
from moe_tta.vllm_plugin import verify
from moe_tta.vllm_plugin.verify import CHECKS, Report, Row

COMMANDS = ["doctor", "request", "verify", "lab path", "lab build", "lab list"]


@pytest.fixture(autouse=True)
def _plain_words(monkeypatch):
    """Tables and help as wide as they need, without colours."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


def run(line):
    return CliRunner().invoke(app, shlex.split(line))


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_shows_an_example(self, command):
        result = run(f"{command} --help")
        assert result.exit_code == 0
        assert "Example: " in result.stdout
        assert f"moe-tta {command}" in result.stdout

    def test_lists_every_command(self):
        words = run("--help").stdout
        assert all(command.split()[0] in words for command in COMMANDS)

    def test_request_has_an_option_for_every_strategy(self):
        words = run("request --help").stdout
        assert all(f"--{name.replace('_', '-')}" in words for name in STRATEGIES)

    def test_imports_neither_torch_nor_vllm(self):
        code = (
            "import sys; from moe_tta.cli import app; "
            "app(['--help'], standalone_mode=False); "
            "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    @pytest.mark.parametrize("line", ["verify", "lab path", "request --nonsense", "x"])
    def test_wrong_usage_exits_2(self, line):
        result = run(line)
        assert result.exit_code == 2
        assert result.stdout == ""


class TestRequest:
    def sent(self, line):
        result = run(line)
        assert result.exit_code == 0, result.stderr
        return json.loads(json.loads(result.stdout)["vllm_xargs"]["moe_tta"])

    def test_members_parse_back(self):
        value = self.sent(
            """request --steer '{"demote": [[0, 1]]}' --dynamic-k '{"k": 1}'"""
            " --renorm never"
        )
        assert value == {
            "steer": {"demote": [[0, 1]]},
            "dynamic_k": {"k": 1},
            "renorm": "never",
        }
        assert parse(value, presets={}).renorm == "never"

    def test_nothing_asked_is_the_neutral_request(self):
        assert self.sent("request") == {}

    def test_preset_is_sent_by_name(self):
        body = json.loads(run("request --preset careful").stdout)
        assert body == {"vllm_xargs": {"moe_tta": "careful"}}

    def test_curl_survives_the_shell(self):
        result = run(
            """request --dynamic-k '{"k": 1}' --curl --model a/b --url http://h:1/"""
            """ --prompt "it's $HOME" """
        )
        words = shlex.split(result.stdout)
        assert words[:3] == ["curl", "-s", "http://h:1/v1/completions"]
        body = json.loads(words[-1])
        assert (body["model"], body["prompt"]) == ("a/b", "it's $HOME")
        assert json.loads(body["vllm_xargs"]["moe_tta"]) == {"dynamic_k": {"k": 1}}

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("""--dynamic-k '{"k": 0}'""", "moe_tta.dynamic_k.k: expected"),
            ("""--dynamic-k '{"k": 1, "k": 2}'""", 'key "k" is given twice'),
            ("--dynamic-k '{k}'", "moe_tta.dynamic_k: expected JSON"),
            ("--steer '[]'", "moe_tta.steer: expected an object"),
            ("""--steer '{"promot": []}'""", "did you mean 'promote'"),
            ("""--steer '{"bias": [[0, 1]]}'""", "moe_tta.steer.bias[0]: expected"),
            ("--renorm sometimes", "moe_tta.renorm: expected 'model'"),
            ("--preset 'a b'", "moe_tta: expected a preset's name"),
            ("--preset a --renorm never", "moe_tta: expected a preset or members"),
            ("--curl --prompt p", "--curl needs --model and --prompt"),
            ("--model m", "go with --curl"),
        ],
    )
    def test_errors_exit_2_and_say_where(self, line, words):
        result = run(f"request {line}")
        assert result.exit_code == 2
        assert words in result.stderr
        assert result.stdout == ""


class TestLab:
    def test_path_prints_only_the_folder(self, monkeypatch, tmp_path):
        monkeypatch.setattr(lab, "lab_path", lambda name: tmp_path / name)
        assert run("lab path smollm2-moe").stdout == f"{tmp_path}/smollm2-moe\n"

    @pytest.mark.parametrize("command", ["path", "build", "build --force"])
    def test_unknown_name_exits_1(self, command):
        result = run(f"lab {command} nope")
        assert result.exit_code == 1
        assert "unknown lab model 'nope'" in result.stderr

    def test_force_builds_anew(self, monkeypatch, tmp_path):
        monkeypatch.setattr(lab, "lab_path", lambda name: tmp_path / "old")
        monkeypatch.setattr(lab, "build", lambda name: tmp_path / "new")
        assert run("lab build olmoe-fine").stdout.endswith("old\n")
        assert run("lab build olmoe-fine --force").stdout.endswith("new\n")

    def test_list_knows_what_is_built(self, monkeypatch, tmp_path):
        monkeypatch.setenv("MOE_TTA_CACHE", str(tmp_path))
        rows = json.loads(run("lab list --json").stdout)
        assert [row["name"] for row in rows] == list(lab.MODELS)
        assert {row["state"] for row in rows} == {"not built"}
        assert all(name in run("lab list").stdout for name in lab.MODELS)


class TestVerify:
    def report(self, monkeypatch, report):
        asked = SimpleNamespace()

        def fake(model, dtype, only, progress):
            asked.args = (model, dtype, only)
            progress("starting")
            return report

        monkeypatch.setattr(verify, "verify", fake)
        return asked

    def test_green(self, monkeypatch):
        rows = [Row("fires", "plugin (float32)", True, "0 [of] 4")]
        asked = self.report(monkeypatch, Report("m", rows))
        result = run("verify m --dtype float32")
        assert result.exit_code == 0
        assert asked.args == ("m", "float32", list(CHECKS))
        assert "0 [of] 4" in result.stdout
        assert result.stderr == "starting\n"

    def test_red(self, monkeypatch):
        asked = self.report(monkeypatch, Report("m", [Row("fires", "", False, "no")]))
        result = run("verify m --only fires --only clean --json")
        assert result.exit_code == 1
        assert asked.args == ("m", "auto", ["fires", "clean"])
        shown = json.loads(result.stdout)
        assert not shown["ok"]
        assert shown["rows"][0]["evidence"] == "no"

    def test_refused(self, monkeypatch):
        self.report(monkeypatch, Report("m", refused="moe-tta does not know it"))
        result = run("verify m")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert "moe-tta does not know it" in result.stderr
