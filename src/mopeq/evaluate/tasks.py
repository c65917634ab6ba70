"""lm-eval tasks on a loaded model, from a folder of task files and without a network.

A task file is lm-evaluation-harness's YAML. For local data write ``dataset_path: json`` and
``dataset_kwargs: {data_files: {test: questions.jsonl}}``; relative paths start at the task folder.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from contextlib import chdir, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mopeq.errors import DataError, InputError
from mopeq.evaluate.bootstrap import RESAMPLES, Estimate, ratio_estimate

__all__ = ["TaskScore", "run_tasks"]


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task. The interval resamples documents; it is absent where the metric is no mean over them.

    reference, difference: the original's score, and how much higher the model's is; None where it was not asked.
    """

    task: str
    metric: str
    score: Estimate
    documents: int
    reference: Estimate | None = None
    difference: Estimate | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskScore:
        """Inverse of ``dataclasses.asdict``."""
        beside = (data.get(name) for name in ("reference", "difference"))
        return cls(
            str(data["task"]),
            str(data["metric"]),
            Estimate.from_json(data["score"]),
            int(data["documents"]),
            *(None if one is None else Estimate.from_json(one) for one in beside),
        )


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    folder: str | Path | None = None,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[TaskScore, ...]:
    """Scores of a loaded model on lm-eval tasks.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        tasks: names of tasks, groups or tags.
        folder: where the task files are; None offers the tasks that lm-eval brings, whose data must be on this machine.
        batch_size: requests that are run together.
        limit: documents of each task; None takes all.
        seed: of few-shot examples and of the bootstrap.
        resamples: of the bootstrap.

    Raises :class:`InputError` where lm-eval is not installed or a task is unknown, :class:`DataError` where a task's
    data cannot be read.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"tasks need lm-eval, which cannot be imported ({error}); install mopeq[eval]") from error
    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"no folder {folder}; expected one with lm-eval task files (.yaml); check the path")
    include = None if folder is None else str(Path(folder).resolve())
    manager = TaskManager(include_path=include, include_defaults=folder is None)
    _check(tasks, manager.all_tasks, folder)
    try:
        with nullcontext() if include is None else chdir(include):
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (OSError, EOFError) as error:  # what the datasets library raises for files and hosts it cannot reach
        raise DataError(
            f"the data of {', '.join(tasks)} cannot be read: {error}; expected files on this machine; check data_files"
        ) from error
    return _scores(found, seed, resamples)


def _check(tasks: Sequence[str], known: Sequence[str], folder: str | Path | None) -> None:
    if not tasks:
        raise InputError("no task named; expected at least one")
    where = "lm-eval" if folder is None else str(folder)
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=4, cutoff=0.5)
            there = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known[:12]) or 'none'}"
            raise InputError(f"no task {task!r} in {where}; {there}")


def _scores(found: Mapping[str, Any], seed: int, resamples: int) -> tuple[TaskScore, ...]:
    """From lm-eval's results: ``{task: {"acc,none": 0.5, "acc_stderr,none": ..., "alias": ...}}`` and samples."""
    scores = []
    for task, values in found["results"].items():
        samples = found["samples"].get(task, [])
        for key, value in values.items():
            metric, _, pipeline = key.partition(",")
            if not pipeline or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            each = [s[metric] for s in samples if s.get("filter", pipeline) == pipeline and metric in s]
            name = metric if pipeline == "none" else key
            scores.append(TaskScore(task, name, _estimate(float(value), each, seed, resamples), len(each)))
    return tuple(scores)


def _estimate(value: float, each: Sequence[Any], seed: int, resamples: int) -> Estimate:
    """The reported value, with an interval if it is the mean of the documents' values."""
    numbers = [float(v) for v in each if isinstance(v, (int, float))]
    if numbers and len(numbers) == len(each) and math.isclose(math.fsum(numbers) / len(numbers), value, rel_tol=1e-6):
        return ratio_estimate(numbers, [1] * len(numbers), seed=seed, resamples=resamples)
    return Estimate(value)
