# SPDX-License-Identifier: Apache-2.0
"""The demo's table, and whether everything came as expected."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.demo.cases import Case
from benchmarks.demo.client import Answer
from benchmarks.demo.traces import Routing

TEXT_CHARS = 60
NOTE = """\
changed: the experts differ from the model's own choice on the same router logits;
tokens: in any layer, choices: over all layers. All requests ran in one batch, so that
ms/token is the time of the batch's steps.
"""
Result = tuple[Case, Answer, Routing | None]


def faults(results: list[Result]) -> list[str]:
    """Say for each request that did not come as expected what was wrong."""
    found = []
    for case, answer, routing in results:
        if case.refused is not None:
            got = (answer.status, answer.param)
            if got != (400, case.refused):
                found.append(f"{case.name}: expected HTTP 400 for {case.refused}")
        elif routing is None:
            found.append(f"{case.name}: HTTP {answer.status}: {answer.text}")
        elif not case.holds(routing):
            found.append(f"{case.name}: expected {case.expected}")
    return found


def print_table(console: Console, results: list[Result]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("request", no_wrap=True)
    table.add_column("text", overflow="fold")
    for what in (
        "tokens\nchanged",
        "choices\nchanged",
        "experts\n/token",
        "ms\n/token",
    ):
        table.add_column(what, justify="right", no_wrap=True)
    for case, answer, routing in results:
        table.add_row(case.name, *_cells(answer, routing))
    console.print(table)
    console.print(NOTE, style="dim")


def _cells(answer: Answer, routing: Routing | None) -> list[str]:
    if routing is None:
        return [escape(f"HTTP {answer.status}: {answer.text}"), *["-"] * 4]
    text = " ".join(answer.text.split())
    return [
        escape(text if len(text) <= TEXT_CHARS else text[: TEXT_CHARS - 1] + "…"),
        f"{routing.changed_tokens:.0%}",
        f"{routing.changed_choices:.0%}",
        f"{routing.experts_per_token:.2f}",
        f"{answer.ms_per_token:.0f}",
    ]
