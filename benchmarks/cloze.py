"""Questions about held-out text, as an lm-eval task: which of four continuations is the real one."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mopeq.data.text import read_texts

CONTEXT, ANSWER, CHOICES = 48, 12, 4
"""Tokens of a context and of a continuation, and how many continuations there are."""
TASK = """task: cloze
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def cloze_task(files: Sequence[str], tokenizer: Any, questions: int, folder: Path, seed: int = 0) -> Path:
    """Write ``folder`` with questions, evenly from all files; wrong continuations are of the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cloze.yaml").write_text(TASK, encoding="utf-8")
    draw = random.Random(seed)
    lines = []
    for path in files:
        ids = tokenizer("\n".join(read_texts(path)), add_special_tokens=False)["input_ids"]
        size = CONTEXT + ANSWER
        starts = draw.sample(range(0, len(ids) - size, size), (questions // len(files)) * CHOICES)
        for at in range(0, len(starts), CHOICES):
            group = starts[at : at + CHOICES]
            choices = [tokenizer.decode(ids[s + CONTEXT : s + size]) for s in group]
            right = choices[0]
            draw.shuffle(choices)
            context = tokenizer.decode(ids[group[0] : group[0] + CONTEXT])
            lines.append(json.dumps({"context": context, "choices": choices, "label": choices.index(right)}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
