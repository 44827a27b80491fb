# SPDX-License-Identifier: Apache-2.0
"""Python blocks run: against a real server, a real engine, or by themselves."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks.demo.server import serve
from tests.docs.blocks import select
from tests.docs.test_data import LAB

SERVED = "http://localhost:8000"


def by_page():
    pages = defaultdict(list)
    for block in select("python", without=("vllm", "openai")):
        pages[block.page].append(block)
    return pages


PAGES = by_page()


def run(block, namespace):
    """Run a block; a failure shows the page and its line."""
    code = compile("\n" * block.line + block.text, block.page, "exec")
    exec(code, namespace)


@pytest.mark.parametrize("page", PAGES)
def test_plain_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import moe_tta

    namespace = {"__name__": "docs", "moe_tta": moe_tta}
    for block in PAGES[page]:
        run(block, namespace)


@pytest.fixture(scope="module")
def url(lab, tmp_path_factory):
    settings = {
        "allow_inline": True,
        "k_max": LAB.k_max,
        "presets": {"thrifty": {"dynamic_k": {"k": 1}}},
    }
    log = tmp_path_factory.mktemp("docs") / "server.log"
    with serve(lab("smollm2-moe"), "smollm2-moe", settings, log) as url:
        yield url


@pytest.mark.parametrize("block", select("python", using="openai"), ids=str)
def test_client_blocks(block, url, capsys):
    namespace = {"__name__": "docs"}
    run(block._replace(text=block.text.replace(SERVED, url)), namespace)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("block", select("python", using="vllm"), ids=str)
def test_engine_blocks(block, tmp_path, lab):
    """As a user runs them: a file of its own, vLLM's engine in another process."""
    lab("smollm2-moe")
    script = Path(tmp_path) / "script.py"
    script.write_text(block.text)
    # without what tests/conftest.py sets for engines in this process
    env = {key: value for key, value in os.environ.items() if key[:5] != "VLLM_"}
    env["VLLM_NO_USAGE_STATS"] = "1"
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip()
