# SPDX-License-Identifier: Apache-2.0
"""The `moe-tta` command. Data goes to stdout, messages to stderr."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Callable, Iterable
from dataclasses import asdict
from enum import Enum
from typing import Annotated, Any, NoReturn, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_tta.errors import RequestError
from moe_tta.remix.cli import remix
from moe_tta.spec import PARAMETER, parse
from moe_tta.strategies import PAIRS, ROUNDS, STRATEGIES
from moe_tta.vllm_plugin.verify import CHECKS, Dtype

app = typer.Typer(
    name="moe-tta",
    help="Test-time routing for Mixture-of-Experts models, per request, in stock vLLM.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
lab = typer.Typer(no_args_is_help=True)
app.add_typer(lab, name="lab", help="Real MoE models, small enough for any machine.")
app.add_typer(
    remix, name="remix", help="Stores of solved questions and their pathways."
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")]
LabName = Annotated[str, typer.Argument(help="A name from `moe-tta lab list`.")]

DEFAULT_URL = "http://localhost:8000"
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}

# typer lists the members of an enumeration as choices
DtypeName = Enum("DtypeName", {name: name for name in get_args(Dtype)}, type=str)
Check = Enum("Check", {name: name for name in CHECKS}, type=str)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"moe-tta: {message}", err=True)
    raise typer.Exit(code)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # text, not markup: evidence and errors may hold brackets
        table.add_row(*(Text(cell, COLOURS.get(cell, "")) for cell in row))
    Console().print(table)


@lab.command("path", epilog="Example: vllm serve $(moe-tta lab path smollm2-moe)")
def lab_path(name: LabName) -> None:
    """Print a model's folder, building the model first if need be."""
    from moe_tta import lab as models

    _print_lab(lambda: models.lab_path(name))


@lab.command("build", epilog="Example: moe-tta lab build smollm2-moe --force")
def lab_build(
    name: LabName,
    force: Annotated[
        bool, typer.Option("--force", help="Build it anew even if it is there.")
    ] = False,
) -> None:
    """Build a model and print its folder."""
    from moe_tta import lab as models

    _print_lab(lambda: models.build(name) if force else models.lab_path(name))


def _print_lab(find: Callable[[], Any]) -> None:
    from moe_tta.lab import LabError

    try:
        typer.echo(find())
    except LabError as err:
        _fail(str(err), 1)


@lab.command("list", epilog="Example: moe-tta lab list --json")
def lab_list(as_json: AsJson = False) -> None:
    """List the models and whether they are built."""
    from moe_tta.doctor import lab_states
    from moe_tta.lab import MODELS

    states = lab_states()
    rows = [
        {
            "name": model.name,
            "architecture": model.architecture,
            "experts": model.num_experts,
            "top_k": model.top_k,
            "state": states[model.name],
            "summary": model.summary,
        }
        for model in MODELS.values()
    ]
    if as_json:
        _print_json(rows)
    else:
        _print_table(rows[0], ([str(cell) for cell in row.values()] for row in rows))


@app.command(epilog="Example: moe-tta doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Examine this environment; exit 1 if vLLM could not run with the plugin."""
    from moe_tta.doctor import examine

    rows = list(examine())
    if as_json:
        _print_json([asdict(row) for row in rows])
    else:
        _print_table(
            ("", "what", "found", "fix"),
            ((row.state, row.name, row.found, row.fix) for row in rows),
        )
    raise typer.Exit(int(any(row.state == "fail" for row in rows)))


def _with_members(command: Callable) -> Callable:
    """Give a command one option per registered strategy family, as keywords."""
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None, typer.Option(metavar="JSON", help=f"Object of {name}.")
            ],
        )
        for name in (*STRATEGIES, *PAIRS, *ROUNDS)
    ]
    own = inspect.signature(command, eval_str=True)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    command.__signature__ = own.replace(parameters=[*named, *options])
    return command


@app.command(
    epilog="Example: moe-tta request --dynamic-k '{\"k\": 1}' --curl --model M "
    "--prompt Hi"
)
@_with_members
def request(
    *,
    renorm: Annotated[
        str | None, typer.Option(metavar="model|always|never", help="Renormalisation.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="An operator's preset, instead of members.")
    ] = None,
    curl: Annotated[
        bool, typer.Option("--curl", help="Print a whole curl command.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="With --curl: the model.")] = None,
    url: Annotated[
        str | None, typer.Option(help=f"With --curl: the server; {DEFAULT_URL}.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="With --curl: the text.")] = None,
    **members: str | None,
) -> None:
    """Check a request's routing and print it as the JSON an HTTP body takes."""
    from moe_tta.client import request as build

    if curl and (model is None or prompt is None):
        _fail("--curl needs --model and --prompt", 2)
    if not curl and (model, url, prompt) != (None, None, None):
        _fail("--model, --url and --prompt go with --curl", 2)
    try:
        given = {k: _load(k, text) for k, text in members.items() if text is not None}
        if renorm is not None:
            given["renorm"] = renorm
        fragment = build(preset=preset, **given).extra_body
    except RequestError as err:
        _fail(str(err), 2)
    if not curl:
        typer.echo(json.dumps(fragment))
        return
    body = json.dumps({"model": model, "prompt": prompt, **fragment})
    where = [f"{(url or DEFAULT_URL).rstrip('/')}/v1/completions"]
    header = ["-H", "Content-Type: application/json"]
    typer.echo(shlex.join(["curl", "-s", *where, *header, "-d", body]))


def _load(member: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise RequestError(f"expected JSON: {err}", f"{PARAMETER}.{member}") from None
    # json keeps the last of repeated keys without a word; the request parser refuses
    parse(f'{{"{member}": {text}}}', presets={})
    return value


@app.command(epilog="Example: moe-tta verify $(moe-tta lab path smollm2-moe)")
def verify(
    model: Annotated[str, typer.Argument(help="Folder or name of a model.")],
    dtype: Annotated[
        DtypeName, typer.Option(help="Of the engines; float32 starts one less.")
    ] = DtypeName.auto,
    only: Annotated[
        list[Check] | None,
        typer.Option(metavar="CHECK", help=f"One of {', '.join(CHECKS)}; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start real engines on a model and check that routing obeys requests.

    Edits must fire, neutral requests must equal stock vLLM's byte for byte, neighbours'
    plans must change nothing, and the prefix cache must keep plans apart.
    Takes one to four minutes; exit 1 if any check is red.
    """
    from moe_tta.vllm_plugin.verify import check_path
    from moe_tta.vllm_plugin.verify import verify as run

    try:
        check_path(model)
    except ValueError as err:
        _fail(str(err), 2)
    names = [check.value for check in (only or Check)]
    report = run(model, dtype.value, names, lambda line: typer.echo(line, err=True))
    if as_json:
        _print_json(report.as_json())
    elif report.refused is None:
        _print_table(
            ("", "check", "engine", "evidence", "s"),
            (
                (
                    "ok" if r.ok else "fail",
                    r.check,
                    r.engine,
                    r.evidence,
                    f"{r.seconds}",
                )
                for r in report.rows
            ),
        )
    if report.refused is not None:
        _fail(report.refused, 1)
    raise typer.Exit(int(not report.ok))
