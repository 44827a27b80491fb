# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own, measured on demand.

`python -m benchmarks.overhead.engine SPEC` starts vLLM, then answers each JSON line on
stdin by one on stdout. Everything that vLLM prints goes to stderr. While it waits, it
uses neither the device nor a core: the engine runs in this process, step by step.

What is timed, on the clock of this process:

decode: seconds of one step of `size` requests, each one token. All prompts fit into
    one prefill step, and the first and last `EDGE` calls of `step()` are left out:
    prefill, the filling and draining of asynchronous scheduling, and the requests'
    ends. The rest is divided by its number of steps.
prefill-new: seconds from the first call of `step()` to the end of requests of one
    token, prompts in one step, plans seen for the first time.
prefill: the same requests again, their plans now in slots.
admit: seconds of `add_request` for one request, in which plans are compiled.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import random
import sys
import time
from typing import Any, TextIO

from benchmarks.overhead.modes import requests
from benchmarks.overhead.spread import spread_routers
from moe_tta.vllm_plugin.model_shape import shape_from_config

EDGE = 4  # calls of step() at either end that are not timed


class Engine:
    """vLLM's offline engine, and measurements on it.

    Args:
        spec: `options` of vLLM's LLM, whether the `plugin` must be on, and the
            `begin` of this process in seconds since the epoch.
    """

    def __init__(self, spec: dict[str, Any]):
        import torch
        from vllm import LLM

        cuda = torch.cuda.is_available()
        free = torch.cuda.mem_get_info()[0] if cuda else 0
        llm = LLM(**spec["options"])
        self.core = llm.llm_engine
        self.config = self.core.vllm_config
        self.shape = shape_from_config(self.config.model_config.hf_text_config)
        self.submitted = 0
        spread = 0
        if spec["options"]["load_format"] == "dummy" and cuda:
            experts = {"num_experts": self.shape.num_experts}
            spread = llm.apply_model(functools.partial(spread_routers, **experts))[0]
        plugin = getattr(self.core.input_processor, "moe_tta", None)
        assert (plugin is not None) == spec["plugin"], "the plugin's switch is ignored"
        self.facts = {
            "start_s": time.time() - spec["begin"],
            "armed_layers": 0,
            "spread_routers": spread,
            "memory": None,
            **self._conditions(),
        }
        if plugin is not None:
            status = llm.collective_rpc("moe_tta_status")[0]
            self.facts["armed_layers"] = len(status["armed_layers"])
        if cuda:
            self.facts["memory"] = {
                "allocated": torch.cuda.memory_allocated(),
                "reserved": torch.cuda.memory_reserved(),
                "device": free - torch.cuda.mem_get_info()[0],
            }

    def _conditions(self) -> dict[str, Any]:
        compilation = self.config.compilation_config
        return {
            "async_scheduling": bool(self.config.scheduler_config.async_scheduling),
            "v2_model_runner": bool(self.config.use_v2_model_runner),
            "cudagraph_mode": str(compilation.cudagraph_mode),
            "cudagraph_capture_sizes": compilation.cudagraph_capture_sizes,
        }

    def measure(self, order: dict[str, Any]) -> dict[str, Any]:
        """Run one order of `rounds.py`; return its times by measure."""
        if order["what"] == "decode":
            return self._decode(order)
        return self._prefill(order)

    def _decode(self, order: dict[str, Any]) -> dict[str, Any]:
        tokens = order["steps"] + 2 * EDGE
        admit = self._submit(order, tokens)
        times, digest = self._drive()
        step = (times[EDGE + order["steps"]] - times[EDGE]) / order["steps"]
        return {"seconds": {"decode": step, "admit": admit}, "digest": digest}

    def _prefill(self, order: dict[str, Any]) -> dict[str, Any]:
        seconds = {}
        for measure in ("prefill-new", "prefill"):
            admit = self._submit(order, 1)
            begin = time.perf_counter()
            times, digest = self._drive()
            seconds[measure] = times[-1] - begin
            seconds.setdefault("admit", admit)
        return {"seconds": seconds, "digest": digest}

    def requests(self, order: dict[str, Any]) -> list[dict[str, Any] | None]:
        """Return what each of an order's requests carries under `moe_tta`."""
        return requests(order["mode"], self.shape, order["size"], order["serial"])

    def _submit(self, order: dict[str, Any], tokens: int) -> float:
        """Admit the order's requests; return the seconds of each."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        size = order["size"]
        vocab = self.config.model_config.get_vocab_size()
        # the same prompts in every mode of a round
        rng = random.Random(f"{order['what']}-{size}-{order['round']}")
        prompts = [
            [rng.randrange(2, vocab) for _ in range(order["prompt"])]
            for _ in range(size)
        ]
        params = [
            SamplingParams(
                max_tokens=tokens,
                temperature=0,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=None if request is None else {"moe_tta": request},
            )
            for request in self.requests(order)
        ]
        begin = time.perf_counter()
        for prompt, param in zip(prompts, params, strict=True):
            name = f"{self.submitted:08}"
            self.core.add_request(name, {"prompt_token_ids": prompt}, param)
            self.submitted += 1
        return (time.perf_counter() - begin) / size

    def _drive(self) -> tuple[list[float], str]:
        """Step until all have ended; return the time after each call, and a digest.

        The digest is of all generated tokens, in the requests' order.
        """
        times, ended = [], {}
        while self.core.has_unfinished_requests():
            for output in self.core.step():
                ended[output.request_id] = output.outputs[0].token_ids
            times.append(time.perf_counter())
        text = json.dumps([list(ended[name]) for name in sorted(ended)])
        return times, hashlib.sha256(text.encode()).hexdigest()[:16]


def claim_stdout() -> TextIO:
    """Return the real stdout; whatever else prints goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def main() -> None:
    """Start the engine and answer until stdin ends."""
    answers = claim_stdout()
    engine = Engine(json.loads(sys.argv[1]))
    gc.collect()
    gc.freeze()
    print(json.dumps(engine.facts), file=answers)
    for line in sys.stdin:
        print(json.dumps(engine.measure(json.loads(line))), file=answers)
    # vLLM's threads would hold the process; there is nothing left to save
    os._exit(0)


if __name__ == "__main__":
    main()
