# SPDX-License-Identifier: Apache-2.0
"""How the routers and expert differences of each lab model are trained."""

from dataclasses import dataclass, field

LANGUAGES = ("de", "es", "fr", "ja", "ru", "zh")


@dataclass(frozen=True)
class Recipe:
    """Sizes, optimisation and text of one training run.

    Attributes:
        rank: Of the differences.
        share: Whether the experts of a layer share one factor of each difference.
        steps: Of the optimiser.
        batch: Windows a step.
        router_lr: Peak learning rate of the routers.
        factor_lr: Peak learning rate of the differences.
        balance: Weight of the load-balance loss.
        divergence: Weight of the divergence from the dense model, KL(dense || MoE).
        mixture: Share of each domain in the windows; empty takes all as they come.
    """

    rank: int
    share: bool = False
    steps: int = 1240
    batch: int = 32
    router_lr: float = 2e-3
    factor_lr: float = 1e-3
    balance: float = 0.02
    divergence: float = 0.0
    mixture: dict[str, float] = field(default_factory=dict)


RECIPES = {
    "smollm2-moe": Recipe(rank=7),
    # Three fifths code and maths; no domain is passed over more than 1.7 times
    "qwen-coder-moe": Recipe(
        rank=3,
        steps=1200,
        divergence=1.0,
        mixture={
            "chat_gsm8k": 0.10,
            "qa_gsm8k": 0.08,
            "math": 0.10,
            "chat_python": 0.04,
            "functions": 0.04,
            "code_python": 0.24,
            "en_dialog": 0.05,
            "en_news_fact": 0.05,
            "en_stories": 0.06,
            "en_wiki_qa": 0.08,
            **{f"lang_{language}": 0.16 / 6 for language in LANGUAGES},
        },
    ),
}
