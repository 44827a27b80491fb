# SPDX-License-Identifier: Apache-2.0
"""What a training run goes on from: parameters, moments and the step, in float32."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(path: Path, optimizer: torch.optim.AdamW, step: int) -> None:
    """Writes a run's state, at once or not at all.

    Args:
        path: the safetensors file; its folder exists.
        optimizer: after at least one step.
        step: how many were made.
    """
    tensors = {"step": torch.tensor(step)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            number = len(tensors)
            tensors[f"{number}.parameter"] = parameter.detach().cpu().contiguous()
            for moment in MOMENTS:
                value = optimizer.state[parameter][moment]
                tensors[f"{number}.{moment}"] = value.cpu().contiguous()
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished)
    os.replace(unfinished, path)


@torch.no_grad()
def load_state(path: Path, optimizer: torch.optim.AdamW) -> int:
    """Restores what `save_state` wrote and returns the step.

    Args:
        path: the safetensors file.
        optimizer: over parameters of the same shapes, in the same order.
    """
    tensors = load_file(path)
    step, number = int(tensors["step"]), 1
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.copy_(tensors[f"{number}.parameter"])
            optimizer.state[parameter] = {
                moment: tensors[f"{number}.{moment}"].to(parameter.device)
                for moment in MOMENTS
            } | {"step": torch.tensor(float(step))}
            number += 1 + len(MOMENTS)
    return step
