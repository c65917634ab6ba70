"""The real lm-eval through the native server, offline: the scores are those of the model in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import packing
from mopeq.load import load, load_tokenizer
from serving import serving

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("tenacity", reason="lm-eval's clients need lm-eval[api]")
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

HEAD = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/colours.jsonl
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
"""
TASKS = {
    "choice": ("multiple_choice", "{{question}}", "{{answer}}", 'doc_to_choice: "{{choices}}"'),
    "rolling": ("loglikelihood_rolling", "", "{{question}}", "metric_list:\n  - metric: byte_perplexity"),
    "words": (
        "generate_until", "{{question}}", "{{choices[0]}}",
        "generation_kwargs: {until: ['.', 'e'], max_gen_toks: 8}\nmetric_list:\n  - metric: exact_match",
    ),
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval and datasets raise many of their own


def test_scores_through_the_server(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, (kind, text, target, more) in TASKS.items():
        made = HEAD.format(name=name, folder=tmp_path, kind=kind, text=text, target=target)
        (tmp_path / f"{name}.yaml").write_text(made + more)
    questions = [{"question": f"number {i} is", "choices": [" red", " blue"], "answer": i % 2} for i in range(6)]
    (tmp_path / "colours.jsonl").write_text("\n".join(map(json.dumps, questions)))
    packed = tmp_path / "packed"
    packing.pack_model(tiny_model("olmoe"), packed)
    model, tokenizer = load(packed, torch.float32), load_tokenizer(packed)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def scored(judged: Any, arguments: str = "") -> Any:
        found = lm_eval.simple_evaluate(
            model=judged, model_args=arguments, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
        )
        answers = {name: [sample["filtered_resps"] for sample in found["samples"][name]] for name in TASKS}
        return {"results": found["results"], "answers": answers}

    with serving((model, tokenizer)) as port:
        served = scored(
            "local-completions",
            f"base_url=http://127.0.0.1:{port}/v1/completions,model=tiny,tokenizer={packed},"
            "tokenizer_backend=huggingface,max_length=512",
        )
    here = scored(HFLM(pretrained=model, tokenizer=tokenizer, max_length=511))
    assert any(made for sample in here["answers"]["words"] for made in sample)
    assert _near(served, here), (served, here)


def _near(got: Any, want: Any) -> bool:
    """The same, numbers within 1e-3: one text at a time in place of a batch of them."""
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(_near(got[key], want[key]) for key in want)
    if isinstance(want, (list, tuple)):
        return len(got) == len(want) and all(map(_near, got, want))
    return bool(got == pytest.approx(want, abs=1e-3) if isinstance(want, float) else got == want)
