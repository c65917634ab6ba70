"""What differs between architectures, as data, and the function that makes a :class:`~mopeq.spec.MoESpec` of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mopeq.adapters.config import Config, count, sizes_of
from mopeq.adapters.layouts import Layout, Shapes, Sizes, shape_error
from mopeq.errors import ModelError
from mopeq.layers import image_experts
from mopeq.spec import Expert, ExpertId, KeptRef, LinearRef, MoELayer, MoESpec, WeightRef

__all__ = ["MLA", "MLA_QUERIES", "MLP", "QKVO", "Family", "spec_of"]

# module of a matrix -> the axis of its weight that is the hidden size, None where neither is
QKVO = {"self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 1, "self_attn.o_proj": 0}
MLA: dict[str, int | None] = {
    "self_attn.q_proj": 1,
    "self_attn.q_a_proj": 1,
    "self_attn.q_b_proj": None,
    "self_attn.kv_a_proj_with_mqa": 1,
    "self_attn.kv_b_proj": None,
    "self_attn.o_proj": 0,
}
MLA_QUERIES = frozenset({"self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_b_proj"})
MLP = {"gate_proj": 1, "up_proj": 1, "down_proj": 0}

_NORMS = r"(input_layernorm|post_attention_layernorm)\.(weight|bias)|self_attn\.(q|k|q_a|kv_a)_(layer)?norm\.weight"
_BUFFERS = re.compile(r"(.*\.)?rotary_emb\.inv_freq\Z")


@dataclass(frozen=True)
class Family:
    """Names of one architecture. Unless said otherwise they are relative to a decoder layer.

    block: module of the sparse MLP; its experts are ``<block>.experts``. stored_block: its name in hub files, where it
    differs. router: module of the router. router_keys: tensors of routers and shared-expert gates (regular expression).
    layouts: how experts are stored, tried in turn. matrices: names of gate, up and down in packed tensors.
    is_moe: whether layer ``i`` has routed experts. width: configuration entry of an expert's intermediate size.
    attention: matrices of attention; alternatives: those of them that not every model has. mixers: ``{entry of
    layer_types: tensors that its layers have instead of others' attention}`` of hybrid models.
    shared: module of the shared experts inside the block. biases, other: tensors kept (regular expressions).
    text: entry of the language model's configuration in that of a vision-language model. decoders: the
    language models it may have, where it may have others too. prefix, head: of the language
    model, absolute. towers: ``{absolute prefix: group}`` of what is kept whole. extra_layers: whether layers after the
    last are multi-token-prediction heads. read: puts a published configuration into the words of transformers.
    renamed: ``((pattern, replacement), ...)`` that turn names in files into those of modules, in order. joined:
    ``{name of a matrix in files: matrices it holds, below each other}``. dropped: absolute names that transformers
    drops on load (regular expression). tied: whether the head is the embedding if nothing says so.
    kinds: ``{module inside the block: layouts}`` where the block has experts for text and others for image tokens, in
    this order, numbered through in files; ``router`` is a name inside that module then, and ``width`` that of a list.
    """

    block: str
    router: str
    layouts: tuple[Layout, ...]
    router_keys: str
    is_moe: Callable[[Config, int], bool]
    stored_block: str = ""
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    width: str = "intermediate_size"
    attention: Mapping[str, int | None] = field(default_factory=lambda: dict(QKVO))
    alternatives: frozenset[str] = frozenset()
    mixers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared: str = ""
    biases: str = r"(?!)"
    other: str = r"(?!)"
    text: str = ""
    decoders: tuple[str, ...] = ()
    prefix: str = "model."
    head: str = "lm_head"
    towers: Mapping[str, str] = field(default_factory=dict)
    extra_layers: bool = False
    read: Callable[[Config], Config] = dict
    renamed: tuple[tuple[str, str], ...] = ()
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: str = r"(?!)"
    tied: bool = False
    kinds: Mapping[str, tuple[Layout, ...]] = field(default_factory=dict)

    @property
    def block_key(self) -> str:
        """The sparse MLP's name in files."""
        return self.stored_block or self.block

    def linears(self, moe: bool) -> dict[str, tuple[str, int | None]]:
        """``{module: (group, hidden axis)}`` of a layer's quantizable matrices outside the routed experts."""
        found = {name: ("attention", axis) for name, axis in self.attention.items()}
        if moe and self.shared:
            found |= {f"{self.block}.{self.shared}.{n}": ("shared_experts", axis) for n, axis in MLP.items()}
        if not moe:
            found |= {f"{self.block}.{n}": ("dense_mlp", axis) for n, axis in MLP.items()}
        return found


def spec_of(model_type: str, family: Family, config: Config, shapes: Shapes) -> MoESpec:
    """Account for every tensor of a checkpoint once: expert matrix, other matrix, kept, or ignored.

    Raises :class:`ModelError` for a model without routed experts, missing experts, shapes that contradict the
    configuration, layers that lack what the others have, and for any tensor that is none of these.
    """
    config = family.read(config)
    if not family.renamed:
        return _account(model_type, family, config, shapes)
    places = _places(family, shapes)
    return _as_stored(family, _account(model_type, family, config, {n: p.shape for n, p in places.items()}), places)


@dataclass(frozen=True)
class _Place:
    """Where a tensor that goes by a module's name lies in a file."""

    key: str
    shape: tuple[int, ...]
    rows: tuple[int, int, int] | None = None


def _places(family: Family, shapes: Shapes) -> dict[str, _Place]:
    """``{name that transformers' modules give it: place}`` of every tensor."""
    found: dict[str, _Place] = {}

    def add(name: str, place: _Place) -> None:
        if name in found:
            raise ModelError(
                f"{place.key} and {found[name].key} are the same tensor of the model; expected one of them; "
                "download the checkpoint again"
            )
        found[name] = place

    for key, shape in shapes.items():
        name = key
        for pattern, replacement in family.renamed:
            name = re.sub(pattern, replacement, name)
        whole = next((stem for stem in family.joined if name.endswith(f"{stem}.weight")), None)
        if whole is None or len(shape) != 2 or shape[0] % len(family.joined[whole]):
            add(name, _Place(key, shape))
            continue
        parts, prefix = family.joined[whole], name.removesuffix(f"{whole}.weight")
        step = shape[0] // len(parts)
        for i, part in enumerate(parts):
            add(f"{prefix}{part}.weight", _Place(key, (step, shape[1]), (i * step, (i + 1) * step, 1)))
    return found


def _as_stored(family: Family, spec: MoESpec, places: Mapping[str, _Place]) -> MoESpec:
    """A specification in modules' names, its tensors under the names that the files have."""

    def stored(ref: WeightRef) -> WeightRef:
        return replace(ref, key=places[ref.key].key)

    def packed(name: str, index: int) -> str:
        """The name that files have for an expert's matrix, or would have where experts are fused."""
        if place := places.get(f"{name}.weight"):
            return place.key.removesuffix(".weight")
        prefix, norm = f"{family.prefix}layers.{index}.", "input_layernorm.weight"
        return places[prefix + norm].key.removesuffix(norm) + name.removeprefix(prefix)

    layers = tuple(
        replace(
            layer,
            experts=tuple(
                replace(
                    e,
                    gate=stored(e.gate),
                    up=stored(e.up),
                    down=stored(e.down),
                    names={m: packed(n, layer.decoder) for m, n in e.names.items()},
                )
                for e in layer.experts
            ),
        )
        for layer in spec.layers
    )
    return replace(
        spec,
        layers=layers,
        linears=tuple(replace(r, key=places[r.key].key, rows=places[r.key].rows) for r in spec.linears),
        kept=tuple(replace(r, key=places[r.key].key) for r in spec.kept),
        ignored=tuple(places[key].key for key in spec.ignored),
    )


def _account(model_type: str, family: Family, config: Config, shapes: Shapes) -> MoESpec:
    text = config.get(family.text) if family.text else config
    if not isinstance(text, Mapping):
        raise ModelError(f"config.json of this {model_type} has no {family.text}; use the model's own config.json")
    if family.decoders and text.get("model_type") not in family.decoders:
        raise ModelError(
            f"this {model_type} has {text.get('model_type')!r} as its language model; "
            f"mopeq knows it with {' or '.join(family.decoders)}; give one of these"
        )
    depth = count(text, "num_hidden_layers")
    if depth > len(shapes):
        raise ModelError(
            f"config.json has num_hidden_layers = {depth}, the checkpoint {len(shapes)} tensors; "
            f"check that they belong together"
        )
    sparse = [i for i in range(depth) if family.is_moe(text, i)]
    if not sparse:
        raise ModelError(f"this {model_type} has no MoE layers, says config.json; mopeq quantizes models with experts")
    widths = sizes_of(text, family.width, list(family.kinds)) if family.kinds else [count(text, family.width)]
    sizes = Sizes(
        experts=count(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        hidden=count(text, "hidden_size"),
        intermediate=widths[0],
        top_k=count(text, "num_experts_per_tok", "moe_k", "moe_topk"),
    )
    if sizes.top_k > sizes.experts:
        raise ModelError(f"config.json asks for {sizes.top_k} of {sizes.experts} experts a token; expected at most all")
    sets = [replace(sizes, intermediate=width, first=i * sizes.experts) for i, width in enumerate(widths)]
    kinds = list(zip(family.kinds or ("",), sets, strict=True))
    layers = tuple(_moe_layer(family, index, kind, shapes, own) for index in sparse for kind, own in kinds)
    claimed = {ref.key for layer in layers for expert in layer.experts for ref in (expert.gate, expert.up, expert.down)}
    rest = sorted(shapes.keys() - claimed, key=_natural)
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", family.tied)))

    linears: list[LinearRef] = []
    kept: list[KeptRef] = []
    ignored: list[str] = []
    unknown: list[str] = []
    by_layer = _by_layer(family, rest)
    places = {f"{family.prefix}layers.{i}.{name}": (i, name) for i, names in by_layer.items() for name in names}
    quantized = {moe: family.linears(moe) for moe in (True, False)}
    for key in rest:
        index, name = places.get(key, (-1, key))
        if _BUFFERS.match(key) or re.fullmatch(family.dropped, key) or (index >= depth and family.extra_layers):
            ignored.append(key)
        elif 0 <= index < depth:
            moe = index in sparse
            if name.removesuffix(".weight") in quantized[moe] and name.endswith(".weight"):
                group, axis = quantized[moe][name.removesuffix(".weight")]
                linears.append(_linear(key, shapes[key], group, axis, sizes.hidden))
            elif why := _kept_in_layer(family, name, moe, quantized[moe]):
                kept.append(KeptRef(key, shapes[key], why))
            else:
                unknown.append(key)
        elif key == f"{family.head}.weight" and tied:
            ignored.append(key)
        elif key == f"{family.head}.weight":
            linears.append(_linear(key, shapes[key], "lm_head", 1, sizes.hidden))
        elif why := _kept_outside(family, key):
            kept.append(KeptRef(key, shapes[key], why))
        else:
            unknown.append(key)
    if unknown:
        raise _not_understood(model_type, unknown, sets[-1])
    _check_extra(max(by_layer, default=0), depth, text)
    _check_outside(family, shapes, tied, sizes.hidden)
    types = _layer_types(model_type, family, text, depth)
    _check_layers(family, {i: by_layer.get(i, set()) for i in range(depth)}, set(sparse), types, shapes, sizes)
    return MoESpec(model_type, layers, tuple(linears), tuple(kept), tuple(ignored))


def _by_layer(family: Family, keys: list[str]) -> dict[int, set[str]]:
    """``{layer: names relative to it}`` of the tensors of decoder layers, buffers of old versions left out."""
    pattern = re.compile(re.escape(family.prefix) + r"layers\.(0|[1-9][0-9]{0,8})\.(.+)\Z", re.DOTALL)
    found: dict[int, set[str]] = {}
    for key in keys:
        if (place := pattern.match(key)) and not _BUFFERS.match(key):
            found.setdefault(int(place[1]), set()).add(place[2])
    return found


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in key.split(".")]


def _moe_layer(family: Family, index: int, kind: str, shapes: Shapes, sizes: Sizes) -> MoELayer:
    """The experts of a decoder layer, or those for one ``kind`` of tokens."""
    prefix, key = f"{family.prefix}layers.{index}.", image_experts(index) if sizes.first else index
    inside = f".{kind}" if kind else ""
    layouts = family.kinds[kind] if kind else family.layouts
    triples = next((found for layout in layouts if (found := layout(prefix, shapes, sizes))), None)
    if triples is None:
        raise ModelError(
            f"layer {index} has no expert tensors; expected {sizes.experts} experts under {prefix}{family.block_key}; "
            f"check that config.json belongs to these weights, or download the checkpoint again"
        )
    experts = []
    for e, (gate, up, down) in enumerate(triples):
        stem = f"{prefix}{family.block_key}{inside}.experts.{e}."
        packed = dict(zip(("gate", "up", "down"), (stem + name for name in family.matrices), strict=True))
        experts.append(Expert(ExpertId(key, e), gate, up, down, packed))
    return MoELayer(
        index=key,
        module=f"{prefix}{family.block}{inside}.experts",
        router=f"{prefix}{family.block}{inside}.{family.router}" if kind else f"{prefix}{family.router}",
        experts=tuple(experts),
        top_k=sizes.top_k,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        dealer=f"{prefix}{family.block}" if kind else "",
    )


def _linear(key: str, shape: tuple[int, ...], group: str, axis: int | None, hidden: int) -> LinearRef:
    if len(shape) != 2:
        raise ModelError(f"tensor {key} has shape {list(shape)}; expected a matrix; download the checkpoint again")
    if axis is not None and shape[axis] != hidden:
        raise shape_error(key, shape, (shape[0], hidden) if axis else (hidden, shape[1]))
    return LinearRef(key.removesuffix(".weight"), key, (shape[0], shape[1]), group)


def _kept_in_layer(family: Family, name: str, moe: bool, linears: Mapping[str, object]) -> str | None:
    """Why a tensor of a decoder layer stays as it is; None if it is not known."""
    if re.fullmatch(_NORMS, name):
        return "norm"
    if name.endswith(".bias") and name.removesuffix(".bias") in linears:
        return "bias"
    if moe and re.fullmatch(family.router_keys, name):
        return "router"
    if moe and re.fullmatch(family.biases, name):
        return "bias"
    return "other" if re.fullmatch(family.other, name) else None


def _kept_outside(family: Family, key: str) -> str | None:
    """Why a tensor outside the decoder layers stays as it is; None if it is not known."""
    exact = {
        f"{family.prefix}embed_tokens.weight": "embedding",
        f"{family.prefix}norm.weight": "norm",
        f"{family.prefix}norm.bias": "norm",
        f"{family.head}.bias": "bias",
    }
    towers = sorted((prefix for prefix in family.towers if key.startswith(prefix)), key=len)
    return exact.get(key) or (family.towers[towers[-1]] if towers else None)


def _not_understood(model_type: str, unknown: list[str], sizes: Sizes) -> ModelError:
    advice = f"check that this is an unmodified {model_type} checkpoint"
    if any(
        key.endswith(("_blocks", "_scales", ".qweight", ".weight_packed", "_scale_inv", "_scale")) for key in unknown
    ):
        advice = "they look quantized already; give the checkpoint in 16 or 32 bits"
    elif any(re.search(rf"experts\.{sizes.first + sizes.experts}\.", key) for key in unknown):
        advice = f"config.json says {sizes.experts} experts; check that it belongs to these weights"
    listed = ", ".join(unknown[:4]) + (" ..." if len(unknown) > 4 else "")
    return ModelError(f"{len(unknown)} tensors of this {model_type} are not understood: {listed}; {advice}")


def _check_extra(last: int, depth: int, text: Config) -> None:
    """Layers after the last are multi-token-prediction heads, as many as the configuration says."""
    allowed = 0 if last < depth else count(text, "num_nextn_predict_layers", "num_mtp_layers", default=1, least=0)
    if last >= depth + allowed:
        raise ModelError(
            f"the checkpoint has a layer {last}; expected {depth} layers from config.json and {allowed} for "
            f"multi-token prediction; check that they belong together"
        )


def _check_outside(family: Family, shapes: Shapes, tied: bool, hidden: int) -> None:
    """The embedding, the last norm and the head are there."""
    embedding = f"{family.prefix}embed_tokens.weight"
    needed = [embedding, f"{family.prefix}norm.weight"] + ([] if tied else [f"{family.head}.weight"])
    for key in needed:
        if key not in shapes:
            raise ModelError(
                f"tensor {key} is missing; expected it in every checkpoint of this kind; download it again"
            )
    if len(shapes[embedding]) != 2 or shapes[embedding][1] != hidden:
        raise shape_error(embedding, shapes[embedding], (*shapes[embedding][:1], hidden))


def _layer_types(model_type: str, family: Family, text: Config, depth: int) -> list[str]:
    """Which of the family's mixers each layer has; empty where there is one kind of layers."""
    if not family.mixers:
        return [""] * depth
    found = text.get("layer_types")
    if not isinstance(found, list) or len(found) != depth or not set(map(str, found)) <= set(family.mixers):
        raise ModelError(
            f"config.json of this {model_type} has layer_types = {found!r}; expected {depth} of "
            f"{', '.join(family.mixers)}; use the model's own config.json"
        )
    return found


def _check_layers(
    family: Family,
    names: Mapping[int, set[str]],
    moe_layers: set[int],
    types: list[str],
    shapes: Shapes,
    sizes: Sizes,
) -> None:
    """Every MoE layer has a router over its experts, every layer what the layers of its kind have."""
    for index in sorted(moe_layers):
        routers = [name for name in names[index] if re.fullmatch(family.router_keys, name)]
        keys = [f"{family.prefix}layers.{index}.{name}" for name in routers]
        shape = (sizes.experts, sizes.hidden)
        fit = [shapes[key] in (shape, shape[::-1] if family.kinds else shape) for key in keys]  # files of ERNIE 4.5 VL
        if sum(fit) < max(1, len(family.kinds)):
            found = ", ".join(f"{key} {list(shapes[key])}" for key in keys) or "no router"
            of_each = " for each kind of tokens" if family.kinds else ""
            raise ModelError(
                f"layer {index} has {found}; expected a router {[*shape]}{of_each}; "
                f"check that config.json and the weights belong together"
            )
    blocks = (f"{family.block}.", f"{family.block_key}.")
    always = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    always |= {f"{name}.weight" for name in family.attention if name not in family.alternatives}
    common = {i: {name for name in found if not name.startswith(blocks)} for i, found in names.items()}
    own = {
        kind: always.union(family.mixers.get(kind, ()), *(common[i] for i in names if types[i] == kind))
        for kind in set(types)
    }
    for kind in (moe_layers, set(names) - moe_layers):
        blocks_have = set[str]().union(*(names[index] - common[index] for index in kind))
        if kind != moe_layers:
            blocks_have |= {f"{family.block}.{name}.weight" for name in MLP}
        for index in sorted(kind):
            if lacking := sorted((own[types[index]] | blocks_have) - names[index]):
                raise ModelError(
                    f"layer {index} lacks {', '.join(lacking[:3])}{' ...' if len(lacking) > 3 else ''}; "
                    f"expected what the other layers of this architecture have; download the checkpoint again"
                )
