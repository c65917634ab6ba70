"""lm-eval on a folder of task files, offline."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import packing
from mopeq.errors import DataError, InputError
from mopeq.evaluate import TaskScore, run_tasks
from mopeq.evaluate.bootstrap import Estimate
from mopeq.load import load, load_tokenizer

CHOICE = """
task: colours_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: colours.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """
task: colours_rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: colours.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
"""
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval and datasets raise many of their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tasks")
    (made / "colours.yaml").write_text(CHOICE)
    (made / "rolling.yaml").write_text(ROLLING)
    (made / "broken.yaml").write_text(CHOICE.replace("colours_local", "broken").replace("colours.jsonl", "none.jsonl"))
    questions = [{"question": f"number {i} is", "choices": [" red", " blue"], "answer": i % 2} for i in range(8)]
    (made / "colours.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return made


@pytest.fixture(scope="module")
def loaded(tiny_model: Callable[..., Path]) -> tuple[Any, Any]:
    path = tiny_model("olmoe")
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))


def test_local_tasks_run_offline(loaded: tuple[Any, Any], folder: Path) -> None:
    pytest.importorskip("lm_eval")
    here = Path.cwd()
    found = run_tasks(*loaded, ["colours_local", "colours_rolling"], folder, batch_size=4)
    assert Path.cwd() == here
    choice, rolling = found
    assert (choice.task, choice.metric, choice.documents) == ("colours_local", "acc", 8)
    assert 0.25 <= choice.score.value <= 0.75  # the model is random and the answers alternate
    assert choice.score.low is not None
    assert choice.score.low < choice.score.value
    assert rolling.metric == "word_perplexity"
    assert rolling.score.value > 1
    assert rolling.score.low is None  # not a mean over documents
    (fewer,) = run_tasks(*loaded, ["colours_local"], folder, limit=3)
    assert fewer.documents == 3


def test_lm_eval_loads_a_packed_folder_itself(tiny_model: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    """What ``lm_eval run --model hf --model_args pretrained=DIR`` calls, and what mopeq measures, are equal."""
    lm_eval = pytest.importorskip("lm_eval")
    packing.pack_model(tiny_model("olmoe"), tmp_path / "packed")
    with chdir(folder):
        said = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={tmp_path / 'packed'},dtype=float32",
            tasks=["colours_rolling"],
            task_manager=lm_eval.tasks.TaskManager(include_path=".", include_defaults=False),
            device="cpu",
            log_samples=False,
        )
    (ours,) = run_tasks(load(tmp_path / "packed"), load_tokenizer(tmp_path / "packed"), ["colours_rolling"], folder)
    found = said["results"]["colours_rolling"]["word_perplexity,none"]
    assert found == pytest.approx(ours.score.value, rel=1e-4)


def test_unknown_task_has_near_matches(loaded: tuple[Any, Any], folder: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(InputError, match=r"no task 'colors_local' in .*; did you mean colours_local"):
        run_tasks(*loaded, ["colors_local"], folder)
    with pytest.raises(InputError, match=r"no task 'zzz' in .*; there are broken, colours_local, colours_rolling"):
        run_tasks(*loaded, ["zzz"], folder)
    with pytest.raises(InputError, match="no task named"):
        run_tasks(*loaded, [], folder)


def test_missing_data_and_folder_are_named(loaded: tuple[Any, Any], folder: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(DataError, match="the data of broken cannot be read"):
        run_tasks(*loaded, ["broken"], folder)
    with pytest.raises(DataError, match=r"no folder .*none; expected one with lm-eval task files"):
        run_tasks(*loaded, ["x"], folder / "none")


def test_without_lm_eval_a_sentence_says_what_to_install(
    loaded: tuple[Any, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"tasks need lm-eval, .*; install mopeq\[eval\]"):
        run_tasks(*loaded, ["colours_local"], folder)


def test_json_round_trip() -> None:
    data = {"task": "a", "metric": "acc", "score": {"value": 0.5, "low": 0.25, "high": 0.75}, "documents": 4}
    assert TaskScore.from_json(data) == TaskScore("a", "acc", Estimate(0.5, 0.25, 0.75), 4)
