# SPDX-License-Identifier: Apache-2.0
"""Writes training text in the forms that maths and code are asked in.

    python -m benchmarks.lab.instructions --gsm8k TRAIN --modules MODULES --model DENSE
        --out OUT

TRAIN is GSM8K's train.jsonl, MODULES a file with a Python module as ``{"text": ...}``
on each line, DENSE a checkpoint folder with a chat template. OUT gets four domains:
GSM8K as chats and as questions with answers, Python functions as chats and alone.
"""

import argparse
import ast
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import AutoTokenizer

CALCULATION = re.compile(r"<<.*?>>")  # GSM8K's calculator marks
LINES = (3, 60)  # of a function, both counted in
Chat = Callable[[str, str], str]


def solution(row: dict) -> str:
    """A GSM8K answer without calculator marks, ending in ``#### number``."""
    return CALCULATION.sub("", row["answer"])


def question_with_answer(row: dict) -> str:
    """A problem as `benchmarks.quality` asks it, and its solution."""
    return f"Question: {row['question']}\nAnswer: {solution(row)}\n\n"


def functions(module: str) -> Iterator[tuple[str, str]]:
    """Yields functions and methods that have a docstring and something after it.

    Yields:
        A function's head, as far as its docstring's end, and the whole function.
    """
    try:
        tree = ast.parse(module)
    except (SyntaxError, ValueError):  # Python 2, or cut off
        return
    lines = module.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None:
            continue
        first, last = node.lineno - 1, node.end_lineno
        ended = node.body[0].end_lineno  # the docstring's last line
        if len(node.body) > 1 and LINES[0] <= last - first <= LINES[1]:
            whole = textwrap.dedent("".join(lines[first:last]))
            head = "".join(whole.splitlines(keepends=True)[: ended - first])
            yield head, whole.rstrip() + "\n"


def chat_by(model: Path) -> Chat:
    """A function that puts a question and an answer into a model's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def chat(question: str, answer: str) -> str:
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        return tokenizer.apply_chat_template(turns, tokenize=False)

    return chat


def domains(problems: list[dict], modules: list[str], chat: Chat) -> dict:
    """The documents of each domain."""
    found = dict.fromkeys(pair for module in modules for pair in functions(module))
    task = "Complete this Python function.\n\n```python\n{}```"
    return {
        "chat_gsm8k": [chat(row["question"], solution(row)) for row in problems],
        "qa_gsm8k": [question_with_answer(row) for row in problems],
        "chat_python": [
            chat(task.format(head), f"```python\n{whole}```") for head, whole in found
        ],
        "functions": [whole for _, whole in found],
    }


def rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for option in ("--gsm8k", "--modules", "--model", "--out"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args()
    modules = [row["text"] for row in rows(args.modules)]
    found = domains(rows(args.gsm8k), modules, chat_by(args.model))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, documents in found.items():
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(documents)} documents")


if __name__ == "__main__":
    main()
