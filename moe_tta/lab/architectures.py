# SPDX-License-Identifier: Apache-2.0
"""Checkpoint layouts that a dense model can be upcycled to.

Both route alike: softmax over all experts, top-k, weights divided by their sum. So
equal experts give the dense FFN whatever the router says.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MoEArchitecture:
    """Names and constants of one MoE architecture.

    Attributes:
        name: The class in transformers and vLLM.
        model_type: Its name in config.json.
        block: The MoE block of a decoder layer.
        matrices: Names of an expert's ``gate``, ``up`` and ``down``.
        experts_key: The entry of config.json that counts experts.
        renamed: Entries of the dense config.json by the name they get.
        config: Entries of config.json that are the same for every model.
        zeros: Shapes of the constant zero tensors of a block; ``hidden`` stands for the
            hidden size.
    """

    name: str
    model_type: str
    block: str
    matrices: dict[str, str]
    experts_key: str
    renamed: dict[str, str] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    zeros: dict[str, tuple] = field(default_factory=dict)

    def config_json(self, base: dict, num_experts: int, top_k: int) -> dict:
        """The config.json of a `base` model upcycled to this architecture."""
        return {
            "architectures": [self.name],
            "model_type": self.model_type,
            **base,
            **{new: base[old] for old, new in self.renamed.items()},
            self.experts_key: num_experts,
            "num_experts_per_tok": top_k,
            **self.config,
        }


MIXTRAL = MoEArchitecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    block="block_sparse_moe",
    matrices={"gate": "w1", "up": "w3", "down": "w2"},
    experts_key="num_local_experts",
    config={"router_jitter_noise": 0.0, "sliding_window": None},
)
# Taken for its biases on q, k and v. Its shared expert has a sigmoid gate without bias,
# which cannot be one; with no units it adds exactly nothing, and vLLM leaves it out.
QWEN2_MOE = MoEArchitecture(
    name="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    block="mlp",
    matrices={"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    experts_key="num_experts",
    renamed={"intermediate_size": "moe_intermediate_size"},
    config={
        "shared_expert_intermediate_size": 0,
        "norm_topk_prob": True,
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    zeros={"shared_expert_gate.weight": (1, "hidden")},
)


@dataclass(frozen=True)
class Upcycle:
    """How a dense model becomes a Mixture of Experts.

    Attributes:
        architecture: Layout of the checkpoint.
        num_experts: In every layer.
        top_k: Experts a token.
        file_per_layer: Whether each layer is a file of its own, so that no more than
            one is in memory while the model is built.
    """

    architecture: MoEArchitecture
    num_experts: int
    top_k: int
    file_per_layer: bool
