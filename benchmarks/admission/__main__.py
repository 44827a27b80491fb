# SPDX-License-Identifier: Apache-2.0
"""Time of admission for one request, in the API process.

`python -m benchmarks.admission --out FILE.json` appends one run to the file.

A sample is one call of the plugin's seam around a stand-in for vLLM's
`process_inputs`, which does the one thing whose cost depends on what a request
carries: it copies the sampling parameters deeply. A new request differs from all
before it in its numbers; a seen one is equal to the one before. Requests come as JSON
text, as from HTTP, and as an object, as offline.
On a machine with other work, read the least time, not the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from itertools import count, repeat
from pathlib import Path
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams

from benchmarks.overhead.modes import edited
from benchmarks.overhead.record import ResultFile, conditions
from moe_tta.spec import PARAMETER
from moe_tta.vllm_plugin.admission import Admission
from moe_tta.vllm_plugin.api_seams import admit
from moe_tta.vllm_plugin.texts import PromptReader

SHAPES = {"16x64": ("olmoe", 16, 64), "48x128": ("qwen3_moe", 48, 128)}
REQUESTS = {
    "none": (),
    "steer + dynamic_k": ("promote", "demote", "bias", "p"),
    "bias": ("bias",),
    "dynamic_k": ("p",),
}
PROMPT = tuple(range(32))


def make_processor(family: str, layers: int, experts: int) -> SimpleNamespace:
    """Return what the seam sees as vLLM's input processor."""
    config = SimpleNamespace(
        model_type=family,
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
    )
    engine = SimpleNamespace(
        additional_config={"moe_tta": {"allow_inline": True}},
        model_config=SimpleNamespace(hf_text_config=config),
    )
    processor = SimpleNamespace(moe_tta=Admission(engine))
    processor.moe_tta_reader = PromptReader(processor)
    return processor


def copy_params(processor: Any, request_id: str, prompt: Any, params: Any) -> Any:
    """Stand in for vLLM's `process_inputs`."""
    return SimpleNamespace(
        sampling_params=params.clone(), cache_salt=None, prompt_token_ids=prompt
    )


def bodies(shape: Any, members: tuple[str, ...]) -> Iterator[dict[str, Any] | None]:
    """Yield requests with these members, each with other numbers."""
    given_before = set()
    for serial in count():
        given = edited(shape, str(serial))
        kept = {
            name: {key: value for key, value in params.items() if key in members}
            for name, params in given.items()
        }
        body = {name: params for name, params in kept.items() if params} or None
        text = json.dumps(body)
        if body is None or text not in given_before:
            given_before.add(text)
            yield body


def time_us(processor: Any, values: Iterator[Any], samples: int) -> dict[str, float]:
    """Return the least and the median time of admitting a request."""
    seam = admit(copy_params)
    times = []
    for _ in range(samples):
        value = next(values)
        extra_args = None if value is None else {PARAMETER: value}
        params = SamplingParams(max_tokens=1, extra_args=extra_args)
        start = perf_counter_ns()
        seam(processor, "id", PROMPT, params)
        times.append((perf_counter_ns() - start) / 1000)
    return {
        "min_us": round(min(times), 1),
        "median_us": round(statistics.median(times), 1),
    }


def measure(samples: int) -> list[dict[str, Any]]:
    """Time every shape, request, form and age."""
    rows = []
    for shape, sizes in SHAPES.items():
        for request, members in REQUESTS.items():
            for form, write in (("text", json.dumps), ("object", dict)):
                for age in ("new", "seen"):
                    processor = make_processor(*sizes)
                    drawn = bodies(processor.moe_tta.shape, members)
                    values = (body and write(body) for body in drawn)
                    if age == "seen":
                        values = repeat(next(values))
                    cell = {"shape": shape, "request": request, "form": form}
                    times = time_us(processor, values, samples)
                    rows.append({**cell, "age": age, **times})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--samples", type=int, default=2000, help="of each cell")
    args = parser.parse_args()
    rows = measure(args.samples)
    for row in rows:
        print("{shape:7} {request:18} {form:7} {age:5}".format(**row), end="")
        print("{min_us:8.1f} us least {median_us:8.1f} us median".format(**row))
    if args.out is not None:
        run = {"conditions": conditions(vars(args)), "rows": rows}
        ResultFile(args.out).write(run)


if __name__ == "__main__":
    main()
