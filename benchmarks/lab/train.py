# SPDX-License-Identifier: Apache-2.0
"""Trains the routers and expert differences of a lab model on one GPU.

    python -m benchmarks.lab.train NAME --model DENSE --windows WINDOWS --out OUT
        [--state STATE --stop-after SECONDS]

DENSE is the dense checkpoint folder, WINDOWS the file that `benchmarks.lab.data`
writes beside windows.json. OUT gets differences.safetensors and train_log.json, every
few minutes and at the end. With STATE a run that was stopped goes on from that file.
"""

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.lab.losses import last_hidden, window_loss
from benchmarks.lab.low_rank import LowRankMoE, as_dense, export, moe_ffn, upcycle
from benchmarks.lab.mixture import mixed
from benchmarks.lab.recipes import RECIPES, Recipe
from benchmarks.lab.state import load_state, save_state
from moe_tta.lab import MODELS, differences

WARMUP_STEPS = 40
FINAL_LR = 0.05  # of the peak
CLIP_NORM = 1.0


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to `FINAL_LR`, as a share of the peak."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * done))


def batches(windows: torch.Tensor, size: int, steps: int, seed: int):
    """Yields `steps` batches of whole windows, reshuffled every epoch."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(windows), generator=generator)
        take, order = order[:size], order[size:]
        yield windows[take]


@torch.no_grad()
def validate(
    model: PreTrainedModel, blocks: list[LowRankMoE], windows: torch.Tensor, size: int
) -> dict[str, float]:
    """Perplexity over held-out windows and mean divergence from the dense model."""
    total = torch.zeros(2)
    for part in windows.split(size):
        tokens = part.to(model.device)
        with as_dense(blocks):
            teacher = last_hidden(model, tokens)
        total += window_loss(model, tokens, teacher).cpu() * len(part)
    entropy, divergence = (total / len(windows)).tolist()
    return {"ppl": math.exp(entropy), "divergence": divergence}


class Run:
    """One training run.

    Args:
        model: the dense model, whose FFNs are `blocks`.
        recipe: sizes and optimisation.
        args: paths and intervals.
        log: what train_log.json holds beside the curve.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: list[LowRankMoE],
        recipe: Recipe,
        args: argparse.Namespace,
        log: dict,
    ):
        self.model, self.blocks, self.recipe = model, blocks, recipe
        self.args, self.log, self.step = args, log | {"curve": []}, 0
        routers = [block.router for block in blocks]
        factors = [f for block in blocks for f in block.factors.values()]
        groups = [
            {"params": routers, "peak": recipe.router_lr},
            {"params": factors, "peak": recipe.factor_lr},
        ]
        self.parameters = routers + factors
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        if args.state and args.state.exists():
            self.step = load_state(args.state, self.optimizer)
            before = json.loads(args.state.with_suffix(".json").read_text())
            self.log["curve"] = before["curve"]

    def losses(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross-entropy, divergence from the dense model and load-balance loss."""
        teacher = None
        if self.recipe.divergence:
            with torch.no_grad(), as_dense(self.blocks):
                teacher = last_hidden(self.model, tokens)
        entropy, divergence = window_loss(self.model, tokens, teacher)
        balance = torch.stack([block.balance for block in self.blocks]).mean()
        return {"loss": entropy, "divergence": divergence, "balance": balance}

    def update(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Makes one step of the optimiser."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(self.step, self.recipe.steps)
        found = self.losses(tokens)
        weights = {"divergence": self.recipe.divergence, "balance": self.recipe.balance}
        total = found["loss"] + sum(w * found[name] for name, w in weights.items())
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return found

    def fit(self, windows: torch.Tensor) -> None:
        """Trains in place until the recipe's last step, or the time is up."""
        start = saved = time.monotonic()
        steps, curve = self.recipe.steps, self.log["curve"]
        before = curve[-1]["seconds"] if curve else 0.0  # of earlier calls
        feed = batches(windows, self.recipe.batch, steps, self.args.seed)
        for tokens in islice(feed, self.step, None):
            found = self.update(tokens.to(self.model.device))
            now = time.monotonic()
            spent = now - start
            last = self.step == steps or spent >= self.args.stop_after
            if last or self.step % self.args.log_every == 0:
                entry = {name: value.item() for name, value in found.items()}
                seconds = round(before + spent, 1)
                curve.append({"step": self.step, **entry, "seconds": seconds})
                print(json.dumps(curve[-1]), flush=True)
            if last or now - saved >= self.args.save_every:
                self.save()
                saved = time.monotonic()
            if last:
                break

    def save(self) -> None:
        """Writes the int8 differences, the log and, if asked for, the state."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        target = self.args.out / "differences.safetensors"
        unfinished = target.with_suffix(".unfinished")
        differences.save(unfinished, export(self.blocks))
        unfinished.replace(target)
        text = json.dumps(self.log, indent=1) + "\n"
        (self.args.out / "train_log.json").write_text(text)
        if self.args.state:
            self.args.state.with_suffix(".json").write_text(text)
            save_state(self.args.state, self.optimizer, self.step)


def conditions(args: argparse.Namespace, recipe: Recipe, device: str) -> dict:
    gpu = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    options = {"seed": args.seed, "compile": args.compile}
    return {
        "model": args.name,
        "device": gpu,
        "python": platform.python_version(),
        **versions,
        **asdict(recipe),
        **options,
    }


def parse() -> tuple[argparse.Namespace, Recipe]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=RECIPES)
    for option in ("--model", "--windows", "--out"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--state", type=Path, help="file that a stopped run goes on in")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds")
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds")
    parser.add_argument("--log-every", type=int, default=40, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--share", action="store_true", help="one factor per layer")
    settings = [f for f in fields(Recipe) if f.type in (int, float)]
    for setting in settings:
        option = f"--{setting.name.replace('_', '-')}"
        parser.add_argument(option, type=setting.type, help="instead of the recipe's")
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in settings}
    changed = {name: value for name, value in given.items() if value is not None}
    recipe = RECIPES[args.name]
    return args, replace(recipe, share=recipe.share or args.share, **changed)


def training_windows(args: argparse.Namespace, recipe: Recipe) -> dict:
    """Windows by split, as int64; those to train on in the recipe's mixture."""
    data = load_file(args.windows)
    if recipe.mixture:
        names = list(json.loads(args.windows.with_suffix(".json").read_text()))
        total, domains = recipe.steps * recipe.batch, data["train_domain"]
        order = mixed(domains, names, recipe.mixture, total, args.seed)
        data["train"] = data["train"][order]
    return {name: data[name].long() for name in ("train", "validation")}


def main() -> None:
    args, recipe = parse()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = training_windows(args, recipe)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model.to(device)
    experts = MODELS[args.name].num_experts
    blocks = upcycle(model, experts, recipe.rank, recipe.share)
    log = conditions(args, recipe, device) | {"train_windows": len(data["train"])}
    with as_dense(blocks):
        dense = validate(model, blocks, data["validation"], recipe.batch)
    log["dense_validation_ppl"] = dense["ppl"]
    run = Run(model, blocks, recipe, args, log)
    if args.compile:
        LowRankMoE.ffn = staticmethod(torch.compile(moe_ffn, dynamic=False))
    run.fit(data["train"])
    LowRankMoE.ffn = staticmethod(moe_ffn)  # validation has other shapes
    if run.step == recipe.steps:
        found = validate(model, blocks, data["validation"], recipe.batch)
        run.log["validation"] = found
        run.save()
    print({k: v for k, v in run.log.items() if k != "curve"})


if __name__ == "__main__":
    main()
