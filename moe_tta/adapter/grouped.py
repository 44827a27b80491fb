# SPDX-License-Identifier: Apache-2.0
"""What stands for a layer's experts on a GPU, where a loop is bound by launches."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import SiLUActivation

from moe_tta.adapter.errors import AdapterError
from moe_tta.kernels.grouped import grouped_experts
from moe_tta.kernels.pairs import PLAIN, PairWork


class GroupedExperts(nn.Module):
    """A layer's experts as two grouped products, and little between them.

    Same weights, arguments and result as transformers' modules; no wait for the
    device, and gradients are summed in a fixed order.

    Args:
        experts: The module it stands for, with weights [E, 2I, H] (gate first) and
            [E, H, I].
        work: What does all but the products; `pairs_triton.TRITON` on a GPU.

    Raises:
        AdapterError: the experts' activation is not SiLU.
    """

    def __init__(self, experts: nn.Module, work: PairWork = PLAIN):
        super().__init__()
        if not isinstance(experts.act_fn, (nn.SiLU, SiLUActivation)):
            raise AdapterError(
                f"the adapter's grouped experts compute SiLU, not {experts.act_fn}; "
                "serve a model whose hidden_act is silu"
            )
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.work = work

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted sum of each row's experts.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K] int64.
            top_k_weights: [T, K], float32.

        Returns:
            [T, H] in the dtype of `hidden_states`, summed in float32.
        """
        return grouped_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_proj,
            self.down_proj,
            self.work,
        )
