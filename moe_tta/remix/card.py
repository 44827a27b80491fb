# SPDX-License-Identifier: Apache-2.0
"""The card of a reference store: what a reader must know before using it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_tta.shape import RouterShape

CARD_FILE = "card.json"

Precision = Literal["float32", "float16"]
Scored = Literal["label", "text"]


class _Card(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelCard(_Card):
    """The model whose pathways a store holds.

    Pathways belong to exact weights, dtype and quantisation; `weights` is
    `checkpoint.weights_hash`. `moe_layers` are decoder-layer numbers.
    """

    name: str
    weights: str
    dtype: str
    quantization: str | None = None
    scoring: str
    num_hidden_layers: int = Field(ge=1)
    moe_layers: list[int] = Field(min_length=1)
    num_experts: int = Field(ge=2)
    top_k: int = Field(ge=1)

    def difference(self, other: ModelCard) -> str:
        """Name every field in which two models differ, but their names."""
        pairs = (
            (name, getattr(self, name), getattr(other, name))
            for name in type(self).model_fields
            if name != "name"
        )
        return "; ".join(f"{n} {a} != {b}" for n, a, b in pairs if a != b)

    @staticmethod
    def of(
        shape: RouterShape,
        *,
        name: str,
        weights: str,
        dtype: str,
        quantization: str | None = None,
    ) -> ModelCard:
        """Describe a model by its routers and checkpoint."""
        return ModelCard(
            name=name,
            weights=weights,
            dtype=dtype,
            quantization=quantization,
            scoring=shape.scoring,
            num_hidden_layers=shape.num_hidden_layers,
            moe_layers=list(shape.layers),
            num_experts=shape.num_experts,
            top_k=shape.top_k,
        )


class EmbedderCard(_Card):
    """What made the embeddings.

    `text` is a sentence-transformers model, named `model` with the weights `weights`;
    `hidden_last` and `hidden_mean` are the served model's own final hidden state, of
    the last prompt token or the mean over the prompt.
    """

    kind: Literal["text", "hidden_last", "hidden_mean"]
    model: str | None = None
    weights: str | None = None
    dim: int = Field(ge=1)


class Counts(_Card):
    """What became of the questions; `kept` is the number of references."""

    questions: int = Field(ge=0)
    too_long: int = Field(ge=0)
    wrong: int = Field(ge=0)
    duplicates: int = Field(ge=0)
    kept: int = Field(ge=1)


class FileCard(_Card):
    """Size and SHA-256 of one file of the store."""

    bytes: int = Field(ge=0)
    sha256: str


class StoreCard(_Card):
    """A store's card.

    `layers` are the decoder layers whose distributions it holds; `precision` how they
    are stored. `duplicates_from` is the cosine similarity from which a reference was
    dropped as a near-duplicate of an earlier one. `score` says how right answers were
    told; `data_sha256` is that of the file of questions.
    """

    format: Literal["moe-tta-remix-1"] = "moe-tta-remix-1"
    model: ModelCard
    layers: list[int] = Field(min_length=1)
    precision: Precision
    embedder: EmbedderCard
    data_sha256: str
    score: str
    duplicates_from: float
    counts: Counts
    shard_rows: list[int] = Field(min_length=1)
    created_by: str
    files: dict[str, FileCard]


class TokenCounts(_Card):
    """What became of the questions, and how many tokens they gave.

    `repeated` tokens had the same text before them as an earlier one, so the same key;
    `unimproved` texts kept the router's own assignments, since no step lowered their
    loss.
    """

    questions: int = Field(ge=0)
    too_long: int = Field(ge=0)
    unimproved: int = Field(ge=0)
    repeated: int = Field(ge=0)
    tokens: int = Field(ge=1)


class DescentCard(_Card):
    """How assignments were found.

    `scored` are the tokens whose likelihood was raised; `before` and `after` the
    texts' mean loss in nats a token.
    """

    scored: Scored
    steps: int = Field(ge=0)
    lr: float
    clip: float
    before: float
    after: float


class TokenCard(_Card):
    """The card of a token store, the memory of kNN-MoE.

    `layers` are the decoder layers it holds, `hidden_size` the length of a key,
    `precision` that of stored keys, `memory_bytes` what an engine holds for it.
    """

    FORMAT: ClassVar[str] = "moe-tta-tokens-1"

    format: Literal["moe-tta-tokens-1"] = "moe-tta-tokens-1"
    model: ModelCard
    layers: list[int] = Field(min_length=1)
    hidden_size: int = Field(ge=1)
    precision: Precision
    data_sha256: str
    descent: DescentCard
    counts: TokenCounts
    memory_bytes: int
    created_by: str
    files: dict[str, FileCard]
