# SPDX-License-Identifier: Apache-2.0
"""Model families: the shape each tiny model must be read as, and what was shown.

`python -m tests.families` prints the table of docs/families.md.
"""

from dataclasses import dataclass, field

from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin.families import REFUSED
from tests.tiny import CONFIGS

# CPU_MLA: the other MLA backend takes no float32. Stock vLLM's rotary kernel for CPUs
# turns DeepSeek's queries wrongly (docs/families.md); vLLM's plain torch code does not.
FLOAT32_MLA = {
    "attention_backend": "CPU_MLA",
    "compilation_config": {"custom_ops": ["-rotary_embedding"]},
}
ALL = (0, 1, 2, 3)


@dataclass(frozen=True)
class Case:
    """One tiny model of `tests/tiny.py`.

    Attributes:
        name: Its name there.
        stands_for: A model that routes the same way.
        shape: What its routers must be read as, with the model's own width.
        cuda_router: vLLM's router class on CUDA, for the same arguments.
        cuda_shown: What has been seen on a GPU.
        cpu_options: Engine options for a float32 engine on CPU.
    """

    name: str
    stands_for: str
    shape: RouterShape
    cuda_router: str
    cuda_shown: str
    cpu_options: dict = field(default_factory=dict)

    @property
    def k_max(self):
        """A width that differs from the model's own, for engines under test."""
        return self.shape.top_k + 2


def shape(layers, num_experts, top_k, renormalize, **fields):
    return RouterShape(
        layers=layers,
        num_hidden_layers=4,
        num_experts=num_experts,
        top_k=top_k,
        k_max=top_k,
        renormalize=renormalize,
        **fields,
    )


SIGMOID = {"scoring": "sigmoid", "has_correction_bias": True}
GROUPS = {"num_expert_group": 4, "topk_group": 2}
SEEN = "equal to stock without a plan"
UNSURE = "equal to stock without a plan in three runs, not in one ([log](log.md))"
BOTH = "equal to stock without a plan, the law with one"

CASES = (
    Case("mixtral", "Mixtral", shape(ALL, 8, 2, True), "FusedTopKRouter", UNSURE),
    Case("olmoe", "OLMoE", shape(ALL, 64, 8, False), "FusedTopKRouter", SEEN),
    Case(
        "qwen2_moe",
        "Qwen2-MoE",
        shape((0, 2, 3), 12, 4, False),
        "FusedTopKRouter",
        BOTH,
    ),
    Case("qwen3_moe", "Qwen3-MoE", shape(ALL, 16, 4, True), "FusedTopKRouter", SEEN),
    Case("gpt_oss", "gpt-oss", shape(ALL, 8, 2, True), "FusedTopKRouter", BOTH),
    Case("granitemoe", "Granite-MoE", shape(ALL, 10, 3, True), "FusedTopKRouter", BOTH),
    Case(
        "deepseek_v2_lite",
        "DeepSeek-V2-Lite",
        shape((1, 2, 3), 16, 4, False),
        "FusedTopKRouter",
        BOTH,
        cpu_options=FLOAT32_MLA,
    ),
    Case(
        "deepseek_v2",
        "DeepSeek-V2",
        shape((1, 2, 3), 16, 4, False, **GROUPS),
        "GroupedTopKRouter",
        f"{BOTH}, [rounded as vLLM's](#deepseek-v2-on-a-gpu)",
        cpu_options=FLOAT32_MLA,
    ),
    Case(
        "deepseek_v3",
        "DeepSeek-V3, R1",
        shape((1, 2, 3), 16, 4, True, **GROUPS, **SIGMOID),
        "GroupedTopKRouter",
        BOTH,
        cpu_options=FLOAT32_MLA,
    ),
    Case(
        "glm4_moe",
        "GLM-4.5",
        shape((2, 3), 16, 4, True, **SIGMOID),
        "GroupedTopKRouter",
        BOTH,
    ),
)


def row(case):
    """Return the case's row of the table."""
    shape = case.shape
    weights = "divided by their sum" if shape.renormalize else "as they are"
    has = {"groups": shape.grouped, "correction bias": shape.has_correction_bias}
    refused = {
        "`target`, `mix`": not shape.is_distribution,
        "promoted experts in too many groups": shape.grouped,
    }
    return (
        f"{case.stands_for} (`{model_type(case)}`)",
        f"{shape.scoring}, {weights}",
        _named(has) or "none",
        "armed, exact",
        f"`{case.cuda_router}`, {case.cuda_shown}",
        _named(refused) or "nothing",
    )


def _named(flags):
    return ", ".join(name for name, holds in flags.items() if holds)


def model_type(case):
    return CONFIGS[case.name].get("model_type", case.name)


def table():
    """Return the lines of the table; families that do not start come last."""
    head = ("family", "scores, weights", "groups, bias", "CPU", "GPU", "refused")
    rows = [row(case) for case in CASES]
    rows += [
        (f"`{name}`", "its own function", "", "refused", "refused", f"all: {reason}")
        for name, reason in REFUSED.items()
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


if __name__ == "__main__":
    print("\n".join(table()))  # noqa: T201
