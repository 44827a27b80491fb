# SPDX-License-Identifier: Apache-2.0
"""The code blocks of README and docs."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)


class Block(NamedTuple):
    page: str
    line: int
    info: str  # what follows the opening fence
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(page):
    text = page.read_text("utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        name = str(page.relative_to(ROOT))
        yield Block(name, line, match[1].strip(), match[2])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def select(info, *, using=None, without=()):
    """Return the blocks of a kind that import `using`, and none of `without`."""

    def imports(block, package):
        return re.search(rf"^(from|import) {package}\b", block.text, re.MULTILINE)

    return [
        block
        for block in BLOCKS
        if block.info == info
        and (using is None or imports(block, using))
        and not any(imports(block, package) for package in without)
    ]
