# SPDX-License-Identifier: Apache-2.0
"""Decode and prefill time with the plugin against stock vLLM, same run, dummy weights.

`python -m benchmarks.overhead --batch 1,8,64 --out FILE.json` starts one engine per
mode in a process of its own, modes interleaved over `--repeat` rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = {"stock": None, "idle": None, "bias": {"steer": {"bias": [[2, 3, 1.0]]}}}
OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def measure(mode: str, batches: list[int], folder: str) -> dict[str, float]:
    """Time one engine: seconds of prefill (128 tokens a row) and of a decode step."""
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    llm = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=1024,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.5,
    )
    found = {"start_s": time.perf_counter() - begin}
    plan = MODES[mode]
    extra = None if plan is None else {"moe_tta": plan}

    def run(batch: int, tokens: int) -> float:
        params = SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, extra_args=extra
        )
        asked = [{"prompt_token_ids": [5 + i % 97] * 128} for i in range(batch)]
        start = time.perf_counter()
        llm.generate(asked, params, use_tqdm=False)
        return time.perf_counter() - start

    for batch in batches:
        run(batch, 4)
        first = statistics.median(run(batch, 1) for _ in range(5))
        whole = statistics.median(run(batch, 129) for _ in range(5))
        found[f"prefill_{batch}_s"] = first
        found[f"decode_{batch}_s"] = (whole - first) / 128
    return found


def child(mode: str, batches: str, folder: str) -> dict[str, float]:
    """Run `measure` in a process of its own."""
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    env["MOE_TTA_DISABLE"] = "1" if mode == "stock" else "0"
    command = [sys.executable, "-m", "benchmarks.overhead", "--child", mode]
    command += ["--batch", batches, "--folder", folder]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.decode().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=MODES)
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.child:
        batches = [int(size) for size in args.batch.split(",")]
        print(json.dumps(measure(args.child, batches, args.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(OLMOE))
        runs = [
            {"mode": mode, **child(mode, args.batch, folder)}
            for _ in range(args.repeat)
            for mode in MODES
        ]
    report(runs, args.out)


def report(runs: list[dict], out: Path | None) -> None:
    """Print medians and ratios against stock; write them as JSON."""
    import torch
    import vllm

    names = [name for name in runs[0] if name != "mode"]
    medians = {
        mode: {
            name: statistics.median(r[name] for r in runs if r["mode"] == mode)
            for name in names
        }
        for mode in MODES
    }
    for name in names:
        base = medians["stock"][name]
        cells = (f"{m} {medians[m][name] / base:.3f}" for m in MODES)
        print(f"{name:18} stock {base * 1e3:9.3f} ms  ratios: {', '.join(cells)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    conditions = {
        "model": "OLMoE dimensions, dummy weights, bfloat16",
        "device": device,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        text = {"conditions": conditions, "medians": medians, "runs": runs}
        out.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
