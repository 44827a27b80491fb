# SPDX-License-Identifier: Apache-2.0
"""`moe-tta remix`: build reference stores and look at them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn, get_args

import typer

from moe_tta.remix.card import Precision, Scored
from moe_tta.remix.embed import MINILM
from moe_tta.remix.errors import StoreError
from moe_tta.remix.questions import Score

remix = typer.Typer(no_args_is_help=True)

PrecisionName = Enum("PrecisionName", {n: n for n in get_args(Precision)}, type=str)
ScoreName = Enum("ScoreName", {n: n for n in get_args(Score)}, type=str)
ScoredName = Enum("ScoredName", {n: n for n in get_args(Scored)}, type=str)
DtypeName = Enum("DtypeName", {n: n for n in ("bfloat16", "float32")}, type=str)


def _fail(error: StoreError) -> NoReturn:
    typer.echo(f"moe-tta: {error}", err=True)
    raise typer.Exit(1)


@remix.command(epilog="Example: moe-tta remix build MODEL questions.jsonl -o store")
def build(
    model: Annotated[str, typer.Argument(help="Folder or name of the model.")],
    data: Annotated[
        Path, typer.Argument(help="Questions, one JSON object a line.", exists=True)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The store's folder.")],
    embedder: Annotated[
        str,
        typer.Option(help="A text embedder, or hidden_last or hidden_mean."),
    ] = MINILM,
    layers: Annotated[
        list[int] | None,
        typer.Option(metavar="LAYER", help="A layer to keep; repeatable; default all."),
    ] = None,
    precision: Annotated[
        PrecisionName, typer.Option(help="Of the stored distributions.")
    ] = PrecisionName.float32,
    score: Annotated[
        ScoreName, typer.Option(help="How log-likelihoods of choices are compared.")
    ] = ScoreName.raw,
    duplicates_from: Annotated[
        float, typer.Option(help="Similarity from which a reference is dropped.")
    ] = 0.98,
    dtype: Annotated[str, typer.Option(help="As vLLM's option.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="As vLLM's option.")] = None,
) -> None:
    """Run questions through vLLM and keep the pathways of those answered rightly.

    A build that was stopped goes on where it was when it is started again.
    """
    from tqdm import tqdm

    from moe_tta.remix.assemble import build_store
    from moe_tta.remix.build import BuildOptions
    from moe_tta.remix.questions import read_questions
    from moe_tta.vllm_plugin.remix_engine import ReferenceEngine, start_engine

    options = BuildOptions(
        embedder=embedder,
        layers=tuple(layers) if layers else None,
        precision=precision.value,
        duplicates_from=duplicates_from,
    )
    try:
        if out.exists():
            raise StoreError(f"{out}: exists already")
        total = sum(1 for _ in read_questions(data))
        llm = start_engine(model, dtype, max_model_len)
        engine = ReferenceEngine(llm, score.value)
        with tqdm(total=total, unit="question") as bar:
            store = build_store(engine, data, out, options, bar.update)
    except StoreError as err:
        _fail(err)
    typer.echo(store.card.counts.model_dump_json())


@remix.command(epilog="Example: moe-tta remix tokens MODEL questions.jsonl -o store")
def tokens(
    model: Annotated[str, typer.Argument(help="Folder or name of the model.")],
    data: Annotated[
        Path, typer.Argument(help="Questions, one JSON object a line.", exists=True)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The store's folder.")],
    scored: Annotated[
        ScoredName, typer.Option(help="Tokens to make likelier, each giving a row.")
    ] = ScoredName.label,
    steps: Annotated[
        int, typer.Option(min=0, help="0 stores the router's own assignments.")
    ] = 10,
    lr: Annotated[float, typer.Option(min=0, help="Logits a step of Adam.")] = 0.1,
    clip: Annotated[float, typer.Option(min=0, help="Largest change of a logit.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Rows of the store.")] = 4096,
    precision: Annotated[
        PrecisionName, typer.Option(help="Of the stored keys.")
    ] = PrecisionName.float32,
    dtype: Annotated[
        DtypeName, typer.Option(help="That the server computes in.")
    ] = DtypeName.bfloat16,
) -> None:
    """Store the router inputs of labelled texts with experts that make them likelier.

    For the strategy knn. Runs on CPU, through the checkpoint itself.
    """
    from tqdm import tqdm

    from moe_tta.adapter.assignments import TokenDescent
    from moe_tta.remix.questions import read_questions
    from moe_tta.remix.reference_model import ReferenceModel
    from moe_tta.remix.tokens_build import TokenOptions, build_tokens

    options = TokenOptions(
        scored=scored.value,
        descent=TokenDescent(steps, lr, clip),
        max_tokens=max_tokens,
        precision=precision.value,
    )
    try:
        if out.exists():
            raise StoreError(f"{out}: exists already")
        total = sum(1 for _ in read_questions(data))
        opened = ReferenceModel.open(model, dtype.value)
        with tqdm(total=total, unit="question") as bar:
            store = build_tokens(
                opened, data, out, options, lambda read: bar.update(read - bar.n)
            )
    except StoreError as err:
        _fail(err)
    typer.echo(store.card.counts.model_dump_json())
    typer.echo(store.card.descent.model_dump_json())


@remix.command(epilog="Example: moe-tta remix show store")
def show(store: Annotated[Path, typer.Argument(help="The store's folder.")]) -> None:
    """Check every file of a store against its card, and print the card."""
    from moe_tta.remix.serving import holds_tokens
    from moe_tta.remix.store import load_store
    from moe_tta.remix.tokens import load_tokens

    try:
        load = load_tokens if holds_tokens(str(store)) else load_store
        opened = load(store)
    except StoreError as err:
        _fail(err)
    typer.echo(opened.card.model_dump_json(indent=2))
