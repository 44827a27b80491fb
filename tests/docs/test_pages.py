# SPDX-License-Identifier: Apache-2.0
"""The pages know everything the code has, and their links lead somewhere."""

import re
from types import SimpleNamespace

import pytest

from moe_tta.settings import EngineSettings
from moe_tta.strategies import PAIRS, ROUNDS, STRATEGIES
from moe_tta.vllm_plugin.families import FAMILIES, REFUSED
from moe_tta.vllm_plugin.limits import _reasons
from tests.docs.blocks import FENCE, PAGES, ROOT
from tests.families import table

LINK = re.compile(r"\]\(([^)\s]+)\)")


def read(name):
    return (ROOT / name).read_text("utf-8")


def anchors(text):
    """Return GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for link in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


@pytest.mark.parametrize("name", [*STRATEGIES, *PAIRS, *ROUNDS])
def test_strategies_are_documented(name):
    assert (ROOT / "docs" / "strategies" / f"{name}.md").is_file()
    assert f"docs/strategies/{name}.md" in read("README.md")
    reference = read("docs/request.md")
    params = {**STRATEGIES, **PAIRS, **ROUNDS}[name].params
    for member in (name, *params.model_fields):
        assert f"| `{member}` |" in reference, member


def test_settings_are_documented():
    for name in EngineSettings.model_fields:
        assert f"| `{name}` |" in read("docs/serve.md"), name


def test_families_are_documented():
    """`python -m tests.families` prints the table that the page must hold."""
    page = read("docs/families.md")
    assert "\n".join(table()) in page
    for family in (*FAMILIES, *REFUSED):
        assert f"`{family}`" in page, family
    assert "docs/families.md" in read("README.md")
    assert "families.md" in read("docs/limits.md")


def test_refused_set_ups_are_documented():
    class Everything(SimpleNamespace):
        def __getattr__(self, name):
            return 2

    config = SimpleNamespace(
        parallel_config=Everything(),
        device_config=SimpleNamespace(device_type="cpu"),
        speculative_config=1,
        lora_config=1,
        kv_transfer_config=1,
    )
    reasons = list(_reasons(config, [SimpleNamespace(is_monolithic=True)]))
    assert len(reasons) >= 11
    limits = read("docs/limits.md")
    assert [reason for reason in reasons if reason not in limits] == []
