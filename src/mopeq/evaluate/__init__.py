"""Judge a model: perplexity, divergence from its original, tasks, speed, memory.

:func:`evaluate` does what is asked for and returns an :class:`Evaluation`, which is the file ``evaluation.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mopeq.data.text import check_length, text_windows
from mopeq.errors import MapError
from mopeq.evaluate.bootstrap import RESAMPLES, Estimate
from mopeq.evaluate.divergence import Comparison, Divergence, compare, divergence, evaluate_many, paired_difference
from mopeq.evaluate.perplexity import Perplexity, perplexity, score_windows, summarize, text_bytes
from mopeq.evaluate.speed import Speed, measure_speed, process_bytes, resident_bytes
from mopeq.evaluate.tasks import TaskScore, run_tasks
from mopeq.progress import Track, silent

__all__ = [
    "Comparison",
    "Divergence",
    "Estimate",
    "Evaluation",
    "Perplexity",
    "Speed",
    "TaskScore",
    "compare",
    "divergence",
    "evaluate",
    "evaluate_many",
    "measure_speed",
    "paired_difference",
    "perplexity",
    "process_bytes",
    "resident_bytes",
    "run_tasks",
]

EVALUATION_FORMAT = "mopeq-evaluation"
EVALUATION_VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model; None or empty where it was not asked for.

    perplexity, reference_perplexity, divergence: on the text, of the model, of the original, and between them.
    resident_bytes: parameters and buffers; process_bytes: the process when done, both models in it if there were two.
    info: text, windows, length, seed, device and types.
    """

    resident_bytes: int
    process_bytes: int | None = None
    perplexity: Perplexity | None = None
    reference_perplexity: Perplexity | None = None
    reference_resident_bytes: int | None = None
    divergence: Divergence | None = None
    tasks: tuple[TaskScore, ...] = ()
    speed: Speed | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary: ``format``, ``version`` and the fields of this record."""
        return {"format": EVALUATION_FORMAT, "version": EVALUATION_VERSION, **asdict(self), "info": dict(self.info)}

    @classmethod
    def from_json(cls, data: object) -> Evaluation:
        """Inverse of :meth:`to_json`. Raises :class:`MapError` on anything unexpected."""
        if not isinstance(data, Mapping) or data.get("format") != EVALUATION_FORMAT:
            raise MapError(f'not an evaluation: expected an object with "format": "{EVALUATION_FORMAT}"')
        if data.get("version") != EVALUATION_VERSION:
            raise MapError(f"evaluation version {data.get('version')!r}; this mopeq reads version {EVALUATION_VERSION}")

        def part(kind: Any, name: str) -> Any:
            return None if data[name] is None else kind(data[name])

        try:
            return cls(
                resident_bytes=int(data["resident_bytes"]),
                process_bytes=part(int, "process_bytes"),
                perplexity=part(Perplexity.from_json, "perplexity"),
                reference_perplexity=part(Perplexity.from_json, "reference_perplexity"),
                reference_resident_bytes=part(int, "reference_resident_bytes"),
                divergence=part(Divergence.from_json, "divergence"),
                tasks=tuple(TaskScore.from_json(task) for task in data["tasks"]),
                speed=part(Speed.from_json, "speed"),
                info=dict(data["info"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MapError(f"malformed evaluation: {error!r}; make it again with mopeq eval") from error


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    *,
    reference: nn.Module | None = None,
    text: str | Path | Sequence[str] | None = None,
    tasks: Sequence[str] = (),
    task_folder: str | Path | None = None,
    speed: bool = False,
    length: int = 512,
    stride: int | None = None,
    limit: int | None = None,
    task_limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    resamples: int = RESAMPLES,
    track: Track = silent,
) -> Evaluation:
    """Everything that is asked for about one model.

    Args:
        model: a transformers causal language model, packed or not.
        tokenizer: its tokenizer.
        reference: the original; adds its perplexity, KL and agreement. Needs a text.
        text: a ``Path`` is read, a string is the text itself, a sequence of strings are documents; None scores no text.
        tasks: lm-eval tasks.
        task_folder: where their files are; None for those that lm-eval brings.
        speed: measure tokens per second.
        length: tokens of a window.
        stride: tokens from one window to the next; None is ``length - 1``.
        limit: windows to score, evenly spread over the text; None takes all.
        task_limit: documents of each task; None takes all.
        batch_size: windows or requests that are run together.
        seed: of the bootstraps and prompts.
        resamples: of the bootstraps.
        track: progress.
    """
    first = next(model.parameters())
    dtype = str(first.dtype).removeprefix("torch.")
    info: dict[str, Any] = {"device": str(first.device), "dtype": dtype, "seed": seed, "resamples": resamples}
    found: dict[str, Any] = {}
    if text is not None:
        check_length(getattr(model, "config", None), length)
        windows = text_windows(text, tokenizer, length, stride=stride, limit=limit)
        size = text_bytes(windows, tokenizer)
        info |= {"text": text.name if isinstance(text, Path) else None, "windows": len(windows), "length": length,
                 "stride": length - 1 if stride is None else stride}  # fmt: skip
        if reference is None:
            nats = score_windows(model, windows, batch_size=batch_size, track=track)
            found["perplexity"] = summarize(nats, windows, size, seed=seed, resamples=resamples)
        else:
            both = compare(
                reference, model, windows, size=size, batch_size=batch_size, seed=seed, resamples=resamples, track=track
            )
            found |= {"perplexity": both.candidate, "reference_perplexity": both.reference,
                      "divergence": both.divergence, "reference_resident_bytes": resident_bytes(reference)}  # fmt: skip
    if tasks:
        found["tasks"] = run_tasks(
            model,
            tokenizer,
            tasks,
            task_folder,
            batch_size=batch_size,
            limit=task_limit,
            seed=seed,
            resamples=resamples,
        )
    if speed:
        found["speed"] = measure_speed(model, seed=seed, track=track)
    return Evaluation(resident_bytes=resident_bytes(model), process_bytes=process_bytes(), info=info, **found)
