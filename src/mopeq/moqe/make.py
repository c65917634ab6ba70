"""``mopeq moqe build``: make variants of one model, or take existing ones, and store them as a set."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from mopeq.allocate import allocate
from mopeq.checkpoint import verify
from mopeq.checkpoint.reader import HASHES
from mopeq.data.samples import bundled_text
from mopeq.data.text import read_texts
from mopeq.errors import InputError, ModelError, OutputError
from mopeq.load import is_packed, load_tokenizer
from mopeq.measure import Calibration, Prepared, measure_prepared, observed
from mopeq.moqe.dense import linear_moments, open_any
from mopeq.moqe.pool import embedding_key, load_variant
from mopeq.moqe.recipes import MIXED, Recipe, parse_recipes
from mopeq.moqe.store import SET_FILE, VariantSet, combine, read_set, tensor_files, tensor_of, write_set
from mopeq.pack import Linears, pack_model
from mopeq.precision import DEFAULT_REST, Precision, PrecisionMap, parse_precision
from mopeq.progress import Track, silent
from mopeq.quantize import require_new
from mopeq.source import open_source, stored_bytes

__all__ = ["build", "document_hashes", "known_calibration", "learning_texts", "workshop"]

COST = "fisher_error"
CLOSE = 2.0**-7
"""Relative difference that storing an embedding in another 16-bit type may make."""


def build(
    model: str | Path,
    variants: Sequence[str],
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    rest: Mapping[str, Precision] | None = None,
    dtype: torch.dtype | None = None,
    command: str = "",
    track: Track = silent,
) -> VariantSet:
    """Variants of one language model, stored in ``out`` with equal tensors once.

    Of a mixture of experts a recipe quantizes the experts; of a dense model all linear layers but the head.

    Args:
        model: folder or hub id of the original checkpoint.
        variants: at least two, in the grammar of :mod:`mopeq.moqe.recipes`: made here, or folders.
        out: folder to make. While it is made, the variants take their whole size beside it too.
        calibration: text of the variants that name none; None is two thirds of the bundled text, the router learns
            from the others.
        rest: precisions of the groups outside the experts, over the defaults.
        dtype: compute type of the original.
        command: command line to record.
        track: progress.

    Raises:
        InputError: a recipe that is not understood, or fewer than two.
        ModelError: a folder that is missing, of another model or tokenizer, or that transformers cannot load here.
        OutputError: ``out`` exists.
    """
    recipes = parse_recipes(variants)
    require_new(Path(out))
    calibration = calibration or Calibration()
    seen: set[str] = set()
    with workshop(Path(out)) as (partial, made):
        folders = {recipe.name: recipe.folder for recipe in recipes if recipe.folder is not None}
        for name, folder in folders.items():  # before hours of work
            _check_same(model, name, folder)
            seen |= known_calibration(folder)
        opened = open_any(model) if any(recipe.folder is None for recipe in recipes) else None
        for data, group in _by_text(recipes, calibration).items():
            assert opened is not None
            asked = replace(calibration, data=data)
            seen |= _make(opened, group, asked, rest or {}, dtype, made, track)
            folders |= {recipe.name: made / recipe.name for recipe in group}
        ordered = {recipe.name: folders[recipe.name] for recipe in recipes}
        stored, size, identity = combine(ordered, partial, {r.name: r.text for r in recipes}, track)
        original = open_source(model)
        base = original.path.resolve().name if Path(model).is_dir() else str(model)
        info = {
            "command": command,
            "parameters": sum(prod(shape) for shape in original.shapes.values()),
            "original_bytes": sum(stored_bytes(original, key) for key in original.shapes),
            "samples": calibration.samples,
            "length": calibration.length,
            "seed": calibration.seed,
        }
        write_set(VariantSet(partial, "language", base, stored, size, identity, tuple(sorted(seen)), info), partial)
    return read_set(out)


@contextmanager
def workshop(out: Path) -> Iterator[tuple[Path, Path]]:
    """A folder beside ``out`` that is renamed to it at the end, and one in it for what is thrown away."""
    out = Path(out).expanduser().absolute()
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        raise OutputError(f"{partial} exists: another mopeq is writing it, or one was killed; wait for it or remove it")
    made = partial / "made"
    made.mkdir(parents=True)
    try:
        yield partial, made
        shutil.rmtree(made)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _by_text(recipes: Sequence[Recipe], calibration: Calibration) -> dict[str | None, list[Recipe]]:
    """Variants to be made, by their calibration text: one pass of the original over each."""
    made: dict[str | None, list[Recipe]] = {}
    for recipe in recipes:
        if recipe.folder is None:
            made.setdefault(recipe.data or calibration.data, []).append(recipe)
    return made


def _calibration_texts(calibration: Calibration) -> list[str]:
    if calibration.data is not None:
        return read_texts(calibration.data)
    return [text for i, text in enumerate(read_texts(bundled_text("calibration.jsonl"))) if i % 3 != 2]


def learning_texts(data: str | Path | None) -> list[str]:
    """Documents for the router: those of ``data``, or the third of the bundled text that variants do not see."""
    texts = read_texts(data or bundled_text("calibration.jsonl"))
    return texts if data is not None else texts[2::3]


def document_hashes(texts: Sequence[str]) -> set[str]:
    """A short hash of each document."""
    return {hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts}


def _make(
    opened: Prepared,
    group: Sequence[Recipe],
    calibration: Calibration,
    rest: Mapping[str, Precision],
    dtype: torch.dtype | None,
    out: Path,
    track: Track,
) -> set[str]:
    """Make the variants that share a calibration text; returns the hashes of the documents that they have seen."""
    calibrated = any(recipe.calibrated for recipe in group)
    texts = _calibration_texts(calibration) if calibrated else []
    prepared, inputs = opened, {}
    if calibrated and opened.spec.layers:
        gradients = any(recipe.method == MIXED for recipe in group)
        prepared = observed(opened, calibration, texts=texts, gradients=gradients, dtype=dtype, track=track)
    elif calibrated:
        inputs = linear_moments(opened, calibration, texts, dtype, track)
    for recipe in group:
        source = prepared if recipe.calibrated else opened
        precisions = _map_of(source, recipe, rest, calibration.seed, track)
        linears = None if opened.spec.layers else Linears(recipe.quantizer, inputs if recipe.calibrated else {})
        pack_model(source, precisions, out / recipe.name, method=recipe.quantizer, linears=linears, track=track)
    return document_hashes(texts)


def _map_of(prepared: Prepared, recipe: Recipe, rest: Mapping[str, Precision], seed: int, track: Track) -> PrecisionMap:
    inventory = prepared.inventory
    if recipe.method != MIXED:
        (base,) = inventory.precisions([4])
        precision = parse_precision(recipe.level, base)
        layers = {} if inventory.layers else dict.fromkeys(("attention", "dense_mlp"), precision)
        return PrecisionMap.uniform(inventory.experts, precision, {**DEFAULT_REST, **layers, **rest})
    if not inventory.layers:
        raise InputError(f"variant {recipe.text!r}: mixed is for mixture-of-experts models; expected such as gptq-4bit")
    options = inventory.precisions()
    stats = measure_prepared(prepared, (COST,), options=options, seed=seed, track=track)
    return allocate(stats, budget=f"{recipe.level}bpw", cost=COST, options=options, rest={**DEFAULT_REST, **rest})


def known_calibration(folder: Path) -> set[str]:
    """Hashes of the documents that a variant of another set was calibrated on, as far as that set says."""
    above = folder.resolve().parent.parent
    return set(read_set(above).calibration) if (above / SET_FILE).is_file() else set()


def _check_same(model: str | Path, name: str, folder: Path) -> None:
    """Raise :class:`ModelError` unless an existing folder is a quantized form of ``model`` that loads and runs here."""
    vocabulary, other = load_tokenizer(model).get_vocab(), load_tokenizer(folder).get_vocab()
    if vocabulary != other:
        raise ModelError(
            f"variant {name} has another tokenizer than {model}: {len(other)} tokens, expected the same "
            f"{len(vocabulary)}; give variants of one model"
        )
    if is_packed(folder):
        found = verify(folder, hashes=(folder / HASHES).is_file()).inventory
        expected = open_any(model).inventory
        same = found.fingerprint == expected.fingerprint
        shapes = f"{found.model_type} with {found.experts}; expected {expected.model_type} with {expected.experts}"
    else:
        found_config, expected_config = _shape(folder), _shape(model)
        same = found_config == expected_config
        shapes = f"{found_config}; expected {expected_config}"
    if not same or not _same_embedding(model, folder):
        what = f"it is {shapes}" if not same else "its input embedding has other values"
        raise ModelError(
            f"variant {name} in {folder} is of another model than {model}: {what}; give variants of one model"
        )
    if not is_packed(folder):
        _prove(name, folder)


def _shape(path: str | Path) -> dict[str, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path).get_text_config()
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {name: getattr(config, name, None) for name in names}


def _same_embedding(model: str | Path, folder: Path) -> bool:
    """Whether the input embeddings agree, up to the rounding of 16-bit types; True where a format hides them."""
    files, base = tensor_files(folder), tensor_files(open_source(model).path)
    key = embedding_key(files)
    if key is None or embedding_key(base) != key:
        return True
    mine, theirs = tensor_of(files[key], key), tensor_of(base[key], key)
    return mine.shape == theirs.shape and torch.allclose(mine.float(), theirs.float(), rtol=CLOSE, atol=1e-6)


def _prove(name: str, folder: Path) -> None:
    """Load a folder of another quantizer and run it on a few tokens."""
    with torch.no_grad():
        logits = load_variant(folder)(input_ids=torch.arange(1, 9)[None]).logits
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"variant {name} in {folder} gives logits that are not finite; check how it was quantized")
