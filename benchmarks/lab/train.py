# SPDX-License-Identifier: Apache-2.0
"""Trains the routers and expert differences of smollm2-moe on one GPU.

    python -m benchmarks.lab.train --model DENSE --windows WINDOWS --out OUT

DENSE is the dense checkpoint folder, WINDOWS the file that `benchmarks.lab.data`
writes. OUT gets differences.safetensors and train_log.json.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from benchmarks.lab.low_rank import LowRankMoE, export, moe_ffn, upcycle
from moe_tta.lab import differences

NUM_EXPERTS = 8
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


def lm_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy, in nats, of [batch, window] tokens."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten()
    )


@torch.no_grad()
def validate(model: LlamaForCausalLM, windows: torch.Tensor, size: int) -> float:
    """Perplexity over held-out windows."""
    losses = [lm_loss(model, part.to(model.device)) for part in windows.split(size)]
    counts = [len(part) for part in windows.split(size)]
    mean = sum(float(x) * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
    return math.exp(mean)


def optimizer_for(blocks: list[LowRankMoE], args: argparse.Namespace):
    routers = [block.router for block in blocks]
    factors = [f for block in blocks for f in block.factors.values()]
    groups = [
        {"params": routers, "lr": args.router_lr},
        {"params": factors, "lr": args.factor_lr},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)


def fit(
    model: LlamaForCausalLM,
    blocks: list[LowRankMoE],
    data: dict[str, torch.Tensor],
    args: argparse.Namespace,
) -> list[dict]:
    """Trains in place and returns the logged curve."""
    optimizer = optimizer_for(blocks, args)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step, args.steps)
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    curve, start = [], time.monotonic()
    feed = batches(data["train"], args.batch, args.steps, args.seed)
    for step, tokens in enumerate(feed, 1):
        loss = lm_loss(model, tokens.to(model.device))
        balance = torch.stack([block.balance for block in blocks]).mean()
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.log_every == 0 or step == args.steps:
            entry = {"step": step, "loss": loss.item(), "balance": balance.item()}
            curve.append(entry | {"seconds": round(time.monotonic() - start, 1)})
            print(json.dumps(curve[-1]), flush=True)
    return curve


def conditions(args: argparse.Namespace, device: str) -> dict:
    gpu = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    options = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    return {"device": gpu, "python": platform.python_version()} | versions | options


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for option in ("--model", "--windows", "--out"):
        parser.add_argument(option, type=Path, required=True)
    for option, value in (("steps", 1240), ("batch", 32), ("rank", 7), ("seed", 0)):
        parser.add_argument(f"--{option}", type=int, default=value)
    for option, value in (("router", 2e-3), ("factor", 1e-3)):
        parser.add_argument(f"--{option}-lr", type=float, default=value)
    parser.add_argument("--balance", type=float, default=0.02)
    parser.add_argument("--log-every", type=int, default=40)
    parser.add_argument("--share", action="store_true", help="one factor per layer")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = {k: v.long() for k, v in load_file(args.windows).items()}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model.to(device)
    log = conditions(args, device) | {"train_windows": len(data["train"])}
    log["dense_validation_ppl"] = validate(model, data["validation"], args.batch)
    blocks = upcycle(model, NUM_EXPERTS, args.rank, args.share)
    if args.compile:
        LowRankMoE.ffn = staticmethod(torch.compile(moe_ffn, dynamic=False))
    start = time.monotonic()
    log["curve"] = fit(model, blocks, data, args)
    log["train_seconds"] = round(time.monotonic() - start, 1)
    LowRankMoE.ffn = staticmethod(moe_ffn)  # validation has other shapes
    log["validation_ppl"] = validate(model, data["validation"], args.batch)
    args.out.mkdir(parents=True, exist_ok=True)
    differences.save(args.out / "differences.safetensors", export(blocks))
    (args.out / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")
    print({k: v for k, v in log.items() if k != "curve"})


if __name__ == "__main__":
    main()
