"""Evaluation files of a few documents for all nine tasks, in the form in which the real ones come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCUMENTS = 3
LOGIQA = "\na\nAll cats sleep.Tom is a cat.\nWhat follows?\nA.Tom sleeps.\nB.Tom runs.\nC.Cats run.\nD.Tom is no cat.\n"
WIKITEXT = " \n = Moon = \n \n The moon is far @-@ away ( and cold ) . \n \n = = Light = = \n \n It shines . \n"


def documents(task: str, number: int) -> dict[str, Any]:
    """One document of a task whose file is JSON lines; they differ by their number."""
    choices = {"choices": [f"red {number}", "blue", "a dark green", "grey"], "gold": number % 4}
    return {
        "lambada_openai": {"context": f"The cat saw the {number} dogs and the dogs saw the", "continuation": "cat"},
        "arc_easy": {"query": f"Question: Which of {number} colours?\nAnswer:", **choices},
        "arc_challenge": {"query": f"Question: Which colour is {number}?\nAnswer:", **choices},
        "hellaswag": {"query": f"Paint: Take {number} brushes.", **choices},
        "piqa": {"goal": f"open {number} doors", "sol1": "turn the handle", "sol2": "eat it", "label": number % 2},
        "winogrande": {
            **{"sentence": f"Ann beat Eve {number} times because _ was fast.", "option1": "Ann", "option2": "Eve"},
            "answer": str(1 + number % 2),
        },
        "sciq": {
            **{"question": f"What are {number} acids?", "support": " They are sour.", "correct_answer": "sour"},
            **{"distractor1": "sweet", "distractor2": "dry", "distractor3": "blue"},
        },
    }[task]


FILES = {
    "lambada_openai": "lambada_openai/lambada_openai.jsonl",
    "arc_easy": "arc_easy/test.jsonl",
    "arc_challenge": "arc_challenge/test.jsonl",
    "hellaswag": "hellaswag/val_1000.jsonl",
    "piqa": "piqa/valid_docs.jsonl",
    "winogrande": "winogrande/validation.jsonl",
    "sciq": "sciq/validation.jsonl",
}
NAMES = sorted([*FILES, "logiqa", "wikitext"])


def write_data(folder: Path, n: int = DOCUMENTS) -> Path:
    """The folder of evaluation data."""
    texts = {file: [json.dumps(documents(task, number)) for number in range(n)] for task, file in FILES.items()}
    texts |= {"logiqa/Test.txt": [LOGIQA] * n, "wikitext/wiki.test.raw": [WIKITEXT] * n}
    for file, lines in texts.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
