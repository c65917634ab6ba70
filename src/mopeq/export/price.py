"""What it costs to have one width where mopeq had several: in bytes, in predicted loss, and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopeq.allocate import allocate, predicted
from mopeq.data.samples import bundled_text
from mopeq.errors import BudgetError, MapError
from mopeq.evaluate import Evaluation, evaluate
from mopeq.export.verb import Plan
from mopeq.load import load, load_original, load_source, load_tokenizer
from mopeq.progress import Track, silent
from mopeq.source import open_source
from mopeq.stats import Stats, cost_options, read_json

__all__ = ["Price", "measured", "priced"]

TIED = {"compressed-tensors": "expert", "gguf": "group"}
"""Formats that want one width for all experts of a layer, and whether gate_up and down share it."""

WINDOWS = 32
"""Windows of held-out text on which an export is measured."""


@dataclass(frozen=True)
class Price:
    """Of an export: its map's predicted loss, which stays, and that of the best map that the format wants.

    layers, mixed: MoE layers, and those whose experts have several precisions. before, after: bytes. loss: None where
    the folder has no ``stats.json`` with the cost of its precisions. uniform: least predicted loss of a map with one
    precision a layer within ``before`` bytes; None where ``loss`` is, or where no such map fits.
    """

    layers: int
    mixed: int
    before: int
    after: int
    loss: float | None
    uniform: float | None

    def sentences(self, form: str) -> list[str]:
        """What a person should know before exporting to ``form``."""
        grown = 100 * (self.after / self.before - 1)
        change = f"{self.before / 1e6:,.2f} MB -> {self.after / 1e6:,.2f} MB ({grown:+.1f} %)"
        if form not in TIED or not self.mixed:
            return [change]
        said = [
            f"{form} wants one width in a layer; the experts of {self.mixed} of {self.layers} layers have several, and "
            f"are stored as wide as their widest, without rounding: {change}"
        ]
        if self.loss is not None and self.uniform is not None:
            said.append(
                f"predicted loss stays {self.loss:.5g} a token; the best map with one precision in a layer, in the "
                f"bytes of this folder, predicts {self.uniform:.5g} (--uniform-layers)"
            )
        else:
            said.append("what a map with one precision in a layer loses is not known: no costs in mopeq/stats.json")
        return said


def priced(plan: Plan) -> Price:
    """The price of a plan, from the statistics in the folder where there are any. Reads no weights."""
    manifest = plan.folder.manifest
    made, inventory = manifest.precisions, manifest.inventory
    mixed = sum(
        len({p for group in made.experts.values() for p in group[layer]}) > 1
        if TIED.get(plan.format) == "expert"
        else any(len(set(group[layer])) > 1 for group in made.experts.values())
        for layer in inventory.layers
    )
    loss, uniform = None, None
    file = plan.folder.path / "mopeq" / "stats.json"
    if plan.format in TIED and file.is_file():
        stats = Stats.from_json(read_json(file))
        cost = str(made.note.get("cost", "fisher_error"))
        try:
            loss = predicted(stats, cost, made)
            best = allocate(
                stats,
                budget=f"{inventory.total_bytes(made)}B",
                cost=cost,
                options=cost_options(stats, cost),
                granularity=TIED[plan.format],
                uniform_layers=True,
                rest=made.rest,
            )
            uniform = float(best.note["predicted_loss"])
        except (MapError, BudgetError):  # a map by hand, with precisions that were not measured; a budget too small
            uniform = None
    return Price(len(inventory.layers), mixed, plan.folder.nbytes, plan.nbytes, loss, uniform)


def measured(plan: Plan, out: str | Path, against: str | Path, track: Track = silent) -> Mapping[str, Evaluation]:
    """``{"packed": ..., "exported": ...}``: both beside the original, on the bundled held-out text.

    The export is read back as the weights that its files say. GGUF files are not: they hold the packed integers.
    """
    original, words = load_original(against), load_tokenizer(plan.folder.path)
    text = [bundled_text(name).read_text(encoding="utf-8") for name in ("heldout_code.txt", "heldout_docs.txt")]

    def judged(model: Any) -> Evaluation:
        return evaluate(model, words, reference=original, text=text, limit=WINDOWS, track=track)

    found = {"packed": judged(load(plan.folder.path, original.dtype))}
    if plan.format != "gguf":
        found["exported"] = judged(load_source(open_source(Path(out)), original.dtype))
    return found
