"""Which packed folders :class:`Lean` runs, and how it is filled.

A configuration must say all that decides, for its defaults are transformers'. A folder that has anything else is for
``mopeq.load``, which says what is wrong with it where something is. The tensors are read by the compiled library while
Python goes on, such as with importing a tokenizer. :func:`lay_out` writes them once as they then are in memory; where
that file is there, it is mapped and nothing is read but what is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from mopeq.checkpoint import Manifest, check_packed, write_tensors
from mopeq.errors import CheckpointError, InputError, ModelError
from mopeq.kernels import GroupLayout, PackedGroup, selected
from mopeq.kernels.attention import PROJECTIONS
from mopeq.kernels.cpu import TYPES
from mopeq.kernels.fill import CODES, POINTS, SCALES, Stored, fill
from mopeq.kernels.layout import PARTS
from mopeq.memory import in_large_pages, touched
from mopeq.precision import FULL, GROUPS, MATRICES, ProjectionGroup
from mopeq.runtime.lean import Layer, Lean, Norm, Shape
from mopeq.runtime.linear import QLinear
from mopeq.source import read_headers

__all__ = ["FAMILIES", "PANELS", "lay_out", "lean_of"]

PANELS, HASHES, STAMP = "mopeq/panels.safetensors", "mopeq/hashes.json", "mopeq.stamp"
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SAID = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps",
        "max_position_embeddings", "num_experts_per_tok")  # fmt: skip
"""What every configuration must say."""
PLAIN = {"hidden_act": "silu", "tie_word_embeddings": False}
"""Settings that must be there and have these values."""
ABSENT: dict[str, Any] = {"attention_bias": False, "clip_qkv": None, "use_sliding_window": False, "mlp_only_layers": [],
          "decoder_sparse_step": 1}  # fmt: skip
"""Settings that must have these values where they are there; transformers' defaults are the same."""


@dataclass(frozen=True)
class Family:
    """Names and habits of a family: where a layer's router lies, whether norms of queries and keys are of each head or
    of all together (None: there are none), what its configuration must say too, what must be absent or null.
    """

    router: str
    norms: str | None
    said: tuple[str, ...] = ()
    null: tuple[str, ...] = ()


FAMILIES = {
    "olmoe": Family("mlp.gate", "all", ("norm_topk_prob",), ("sliding_window", "head_dim")),
    "qwen3_moe": Family("mlp.gate", "head", ("norm_topk_prob", "head_dim")),
    "mixtral": Family("block_sparse_moe.gate", None, (), ("sliding_window",)),
}
"""By model type. Whoever adds one has tests/runtime/test_lean.py judge it."""


def lean_of(
    path: str | Path, dtype: torch.dtype | None = None, threads: int | None = None, *, mapped: bool = True
) -> Lean | None:
    """A packed folder as a :class:`Lean` that is being filled, by ``threads`` threads or torch's; None where it is for
    ``mopeq.load``: another family, other settings, a model on the hub, no compiled kernel.

    Args:
        path: folder of a packed checkpoint.
        dtype: type of activations and of what is not packed; None takes the checkpoint's.
        threads: that read.
        mapped: take the file of :func:`lay_out` where there is one.

    Raises:
        CheckpointError: damaged files, or packed tensors that are not what the map says.
    """
    folder = Path(path)
    config = _json(folder / "config.json")
    settings = config.pop("quantization_config", None)
    if not isinstance(settings, dict) or settings.get("quant_method") != "mopeq" or selected().name != "cpu":
        return None
    kind = dtype or _dtype(config)
    shape, family = _shape(config), FAMILIES.get(str(config.get("model_type")))
    own = folder / "generation_config.json"
    generation = _json(own) if own.is_file() else config
    if shape is None or family is None or kind not in TYPES or "eos_token_id" not in generation:
        return None
    plan = _Plan(Manifest.from_json(settings), kind, mapped=_mapped(folder, kind) if mapped else {})
    if not plan.mapped:
        try:
            files = read_headers(folder)
        except ModelError as error:
            raise CheckpointError(str(error)) from error
        check_packed(plan.manifest, {key: entry[:2] for header in files.values() for key, entry in header.items()})
        plan.places = {key: (folder / name, *entry) for name, header in files.items() for key, entry in header.items()}
        if not _suits(plan, config, shape, family):
            return None
    layers = [_layer(plan, shape, family, number) for number in range(config["num_hidden_layers"])]
    embed, norm = plan.kept("model.embed_tokens.weight"), Norm(plan.kept("model.norm.weight"), shape.eps)
    head = plan.linear("lm_head")
    filled = _begun(plan, threads or torch.get_num_threads())
    return Lean(shape, embed, layers, norm, head, filled, config["max_position_embeddings"],
                generation["eos_token_id"], plan.made)  # fmt: skip


def lay_out(path: str | Path) -> int:
    """Write a folder's tensors into ``mopeq/panels.safetensors`` as :class:`Lean` has them in memory, in its own type.

    :func:`lean_of` maps them from then on: a process begins at once, several share the memory, and the disk holds the
    model twice. Returns the bytes of the file. Raises :class:`ModelError` where the folder is none for :class:`Lean`,
    or is not as ``mopeq quantize`` writes it.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; expected a folder of mopeq quantize on this machine")
    lean = lean_of(folder, mapped=False)
    stamp = None if lean is None else _stamp(folder, lean.embed_tokens.weight.dtype)
    if lean is None or stamp is None:
        families = ", ".join(FAMILIES)
        raise ModelError(
            f"{folder} cannot be laid out; expected a folder of mopeq quantize with all its files, a family of "
            f"{families}, its usual settings and the compiled CPU kernel; run it as it is"
        )
    lean.filled.result()
    beside = folder / f"{PANELS}.partial"
    try:
        entry, _ = write_tensors(beside, {**lean.tensors, STAMP: stamp}, align=64)
        beside.replace(folder / PANELS)
    finally:
        beside.unlink(missing_ok=True)
    return int(entry["bytes"])


def _stamp(folder: Path, dtype: torch.dtype) -> Tensor | None:
    """What a file of panels is of, uint8 (32,): hashes of the folder's files, which have their sizes, and a type."""
    try:
        raw = (folder / HASHES).read_bytes()
        sizes = {name: (folder / name).stat().st_size for name in json.loads(raw)["files"]}
        if any(entry["bytes"] != sizes[name] for name, entry in json.loads(raw)["files"].items()):
            return None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return torch.frombuffer(bytearray(hashlib.sha256(f"1 {dtype} ".encode() + raw).digest()), dtype=torch.uint8)


def _mapped(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """What :func:`lay_out` wrote of these files in this type, mapped; empty where there is none of them."""
    file = folder / PANELS
    if not file.is_file():
        return {}
    try:
        with safe_open(file, "pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}; delete it, or run mopeq panels {folder} again") from error
    stamp, wanted = tensors.pop(STAMP, None), _stamp(folder, dtype)
    if stamp is None or wanted is None or not stamp.equal(wanted):
        logging.getLogger("mopeq").warning(
            "%s is of other files, or of another type than %s; mopeq panels %s writes it anew", file, dtype, folder
        )
        return {}
    return tensors


def _json(file: Path) -> dict[str, Any]:
    """Empty where there is none, or one that is for transformers to refuse."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    found = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), None)
    return found if isinstance(found, torch.dtype) else None


def _shape(config: Mapping[str, Any]) -> Shape | None:
    """What a configuration says, or None where it leaves something to defaults or wants what is not here."""
    family = FAMILIES.get(str(config.get("model_type")))
    rotation = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rotation.get("rope_theta", config.get("rope_theta")) if isinstance(rotation, dict) else None
    if (
        family is None
        or not isinstance(theta, int | float)
        or {**rotation, "rope_theta": theta, "rope_type": rotation.get("rope_type", "default")}
        != {"rope_theta": theta, "rope_type": "default"}
        or any(config.get(name) is None for name in (*SAID, *family.said))
        or any(config.get(name) is not None for name in family.null)
        or any(config.get(name) != value for name, value in PLAIN.items())
        or any(config.get(name, value) != value for name, value in ABSENT.items())
    ):
        return None
    heads = config["num_attention_heads"]
    mixtral = config["model_type"] == "mixtral"
    return Shape(heads, config["num_key_value_heads"], config.get("head_dim") or config["hidden_size"] // heads,
                 config["rms_norm_eps"], float(theta), config["num_experts_per_tok"],
                 mixtral or config["norm_topk_prob"], not mixtral)  # fmt: skip


@dataclass
class _Plan:
    """Where tensors lie, ``{key: (file, dtype, shape, begin, end)}``, and which go where, unless all are ``mapped``.

    ``made`` are the model's. Those that are stored in another type are read at once.
    """

    manifest: Manifest
    dtype: torch.dtype
    places: Mapping[str, tuple[Path, str, tuple[int, ...], int, int]] = field(default_factory=dict)
    jobs: list[Stored] = field(default_factory=list)
    made: dict[str, Tensor] = field(default_factory=dict)
    mapped: Mapping[str, Tensor] = field(default_factory=dict)

    def kept(self, key: str) -> Tensor:
        """A tensor that is not packed, in the model's type."""
        if self.mapped:
            return self.mapped[key]
        file, stored, shape, begin, end = self.places[key]
        made: Tensor = in_large_pages(torch.empty(shape, dtype=STORED[stored]))
        job = Stored(file, begin, end, made.data_ptr())
        if made.dtype == self.dtype:
            self.jobs.append(job)
        else:
            fill([job], 1)
            made = made.to(self.dtype)
        self.made[key] = made
        return made

    def packed(self, name: str, layout: GroupLayout, bases: list[list[str]]) -> PackedGroup:
        """Matrices under their base names, those of each expert, in panels; ``name`` is that of all of them."""
        keys = {part: f"{name}.{part}" for part in PARTS}
        if self.mapped:
            scales, zeros = (self.mapped.get(keys[part]) for part in ("scales", "zeros"))
            return PackedGroup(layout, self.mapped[keys["qweight"]], scales, zeros, "panels")
        buffers = {part: in_large_pages(torch.empty(layout.size(part), dtype=dtype)) for part, dtype in PARTS.items()}
        for names, precision, rows in zip(bases, layout.precisions, layout.table.tolist(), strict=True):
            for base, (bits, group, _, out, inputs, *at) in zip(names, rows, strict=True):
                for part, first in zip(PARTS, at, strict=True):
                    if f"{base}.{part}" not in self.places:
                        continue
                    file, _, _, begin, end = self.places[f"{base}.{part}"]
                    to = buffers[part].data_ptr() + first * buffers[part].itemsize
                    if bits == 16:
                        self.jobs.append(Stored(file, begin, end, to))
                        continue
                    columns = inputs // precision.weights_per_code if part == "qweight" else inputs // group
                    kind = {"qweight": CODES, "scales": SCALES, "zeros": POINTS}[part]
                    self.jobs.append(Stored(file, begin, end, to, kind, out, columns, precision.code_bits))
        held = {part: buffer if len(buffer) else None for part, buffer in buffers.items()}
        self.made |= {keys[part]: buffer for part, buffer in held.items() if buffer is not None}
        return PackedGroup(layout, buffers["qweight"], held["scales"], held["zeros"], "panels")

    def linear(self, module: str) -> Any:
        """A linear outside the experts: packed, or a plain one."""
        linear = self.manifest.linears[module]
        if linear.precision == FULL:
            return partial(functional.linear, weight=self.kept(f"{linear.tensors}.weight"))
        made = QLinear(linear.shape[1], linear.shape[0], linear.precision, device=torch.device("meta"))
        group = self.packed(linear.tensors, made.layout, [[linear.tensors]])
        for part in PARTS:
            flat = getattr(group, part)
            made._buffers[part] = None if flat is None else flat.view(made._buffers[part].shape)  # type: ignore[union-attr]
        made.mopeq_form = "panels"
        return made


def _suits(plan: _Plan, config: Mapping[str, Any], shape: Shape, family: Family) -> bool:
    """Whether a folder has the tensors of such a model and no others, packed as the kernel takes them."""
    manifest, count, hidden = plan.manifest, config["num_hidden_layers"], config["hidden_size"]
    if set(manifest.experts) != set(range(count)):
        return False
    linears = {f"{_at(number)}.self_attn.{name}_proj" for number in range(count) for name in PROJECTIONS} | {"lm_head"}
    kept: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden),
                                        "model.norm.weight": (hidden,)}  # fmt: skip
    width = {"q": shape.heads * shape.size, "k": shape.kv_heads * shape.size}
    for number, layer in manifest.inventory.layers.items():
        kept |= {f"{_at(number)}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        kept[f"{_at(number)}.{family.router}.weight"] = (layer.experts, hidden)
        if family.norms is not None:
            each = shape.size if family.norms == "head" else 0
            kept |= {f"{_at(number)}.self_attn.{n}_norm.weight": (each or width[n],) for n in "qk"}
    known = {*manifest.packed_tensors(), *manifest.full_tensors()}
    layouts = [_layouts(manifest, number)[g] for number in manifest.experts for g in GROUPS]
    layouts += [GroupLayout((v.precision,), (v.shape,)) for v in manifest.linears.values()]
    return (
        {key: entry[2] for key, entry in plan.places.items() if key not in known} == kept
        and set(manifest.linears) == linears
        and all(plan.places[key][1] in STORED for key in (*kept, *manifest.full_tensors()))
        and all(v.precision != FULL or n == "lm_head" for n, v in manifest.linears.items())
        and all(layout.has_panels and layout.left_out is None for layout in layouts)
    )


def _at(number: int) -> str:
    return f"model.layers.{number}"


def _layouts(manifest: Manifest, number: int) -> dict[ProjectionGroup, GroupLayout]:
    shapes = manifest.inventory.layers[number]
    return {g: GroupLayout(manifest.precisions.experts[g][number], shapes.matrices(g)) for g in GROUPS}


def _begun(plan: _Plan, threads: int) -> Future[None]:
    pool = ThreadPoolExecutor(1, "mopeq-fill")
    filled = pool.submit(_filled, plan.jobs, threads, plan.made)
    pool.submit(touched, [tensor for tensor in plan.mapped.values() if tensor.numel()])  # nobody waits for it
    pool.shutdown(wait=False)
    return filled


def _filled(jobs: list[Stored], threads: int, kept: Mapping[str, Tensor]) -> None:
    """``kept`` are the tensors that the jobs fill: they stay while this runs, whatever becomes of the model."""
    try:
        fill(jobs, threads)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}; copy it again") from error
    except InputError as error:
        raise CheckpointError(f"the packed files changed while they were read ({error}); run again") from error


def _layer(plan: _Plan, shape: Shape, family: Family, number: int) -> Layer:
    at, experts = _at(number), plan.manifest.experts[number]
    attention = {f"{name}_proj": plan.linear(f"{at}.self_attn.{name}_proj") for name in PROJECTIONS}
    if family.norms is not None:
        attention |= {f"{n}_norm": Norm(plan.kept(f"{at}.self_attn.{n}_norm.weight"), shape.eps) for n in "qk"}
    gate_up, down = (
        plan.packed(f"{experts.tensors}.{group}", layout, [[experts.base(e, matrix) for matrix in MATRICES[group]]
                                                           for e in range(len(layout.precisions))])
        for group, layout in _layouts(plan.manifest, number).items()
    )  # fmt: skip
    return Layer(
        Norm(plan.kept(f"{at}.input_layernorm.weight"), shape.eps),
        SimpleNamespace(**attention, head_dim=shape.size, scaling=shape.size**-0.5),
        Norm(plan.kept(f"{at}.post_attention_layernorm.weight"), shape.eps),
        plan.kept(f"{at}.{family.router}.weight"), gate_up, down,
    )  # fmt: skip
