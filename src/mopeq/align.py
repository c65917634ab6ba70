"""After the weights: routers fitted to the original's choices, and kept only where text kept apart says so.

Rounded weights change the hidden states that routers read, and so which experts they choose. Each router is fitted, at
the hidden states of the packed model, to the logits that the original's router has at its own: by the KL between
softmaxes over the original's likeliest experts (EAQuant, arXiv 2506.13329). One pass of both models serves all layers.
If asked for, norms and routers then learn, in one pass over the same text, from the KL of all logits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.analyze import observe
from mopeq.analyze.forward import Batch, frozen, inputs_of, logits_of, token_mask
from mopeq.checkpoint import read_manifest, restored, with_tensors
from mopeq.errors import InputError, ModelError
from mopeq.evaluate import Divergence, Estimate, paired_difference
from mopeq.load import load, load_source
from mopeq.measure import Calibration, Prepared, calibrated, open_model, split_texts
from mopeq.memory import both_in_memory
from mopeq.progress import Track, silent
from mopeq.source import decoder_layer
from mopeq.spec import MoELayer, MoESpec
from mopeq.stats import read_json, write_json
from mopeq.stream import stored_dtype
from mopeq.trial import compared, judged, spare_batches

__all__ = [
    "ALIGNED",
    "Aligned",
    "Alignment",
    "align",
    "align_folder",
    "aligned",
    "check_routers",
    "fitted",
    "likeliest",
    "router_loss",
]

ALIGNED = "mopeq/aligned.json"
"""What was found, in a packed folder."""
RATE = 0.02
"""First learning rate of a router, in root mean squares of its weights; it falls to zero."""
ROWS = 2048
"""Tokens of a step."""


@dataclass(frozen=True)
class Alignment:
    """How to align. steps: of each router; 0 leaves it. tune: first learning rate of norms and routers, 0 for none."""

    steps: int = 200
    tune: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 <= self.tune < 1 or (self.steps == 0 and self.tune == 0):
            raise InputError(
                f"alignment of {self.steps} steps, tuned at {self.tune:g}; expected steps from 0 on, a rate from 0 to "
                "below 1, not both 0"
            )


@dataclass(frozen=True)
class Aligned:
    """What aligning did, on text kept apart: shares are of the original's choices of experts that the model makes too.

    layers: those shares before and after, by layer. difference: of the KL to the original, nats a token, with its
    interval over windows. kept: whether the interval lies below zero; otherwise the model is as it was.
    """

    kept: bool
    before: float
    after: float
    layers: Mapping[int, tuple[float, float]]
    kl_before: float
    kl_after: float
    difference: Estimate
    windows: int
    seconds: float

    @property
    def sentence(self) -> str:
        """For people."""
        gain = self.difference
        interval = "" if gain.low is None or gain.high is None else f" ({gain.low:+.4g} to {gain.high:+.4g})"
        seen = (
            f"on {self.windows} windows kept apart they choose {100 * self.after:.2f} % of the original's experts, "
            f"{100 * self.before:.2f} % before, KL {self.kl_after:.4g} against {self.kl_before:.4g}; difference "
            f"{gain.value:+.4g}{interval}"
        )
        if self.kept:
            return f"routers aligned: {seen}"
        return f"routers as they were, aligned ones do not lower the KL beyond its interval: {seen}"

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        layers = {str(index): list(pair) for index, pair in self.layers.items()}
        return {"format": "mopeq-aligned", "version": 1, **asdict(self), "layers": layers, "sentence": self.sentence}


def align(
    folder: str | Path,
    model: str | Path,
    *,
    calibration: Calibration | None = None,
    how: Alignment | None = None,
    dtype: torch.dtype | None = None,
    command: str = "",
    track: Track = silent,
) -> Aligned:
    """The ``align`` verb: align a packed folder in place, or leave its weights as they are.

    What was found is left in ``mopeq/aligned.json`` and ``run.json``; a folder with other routers is compared with the
    original again (``evaluation.json``). Both models are in memory together, and for each token and layer twice the
    router's input.

    Args:
        folder: the packed checkpoint.
        model: folder or hub id of its original.
        calibration: text to fit to; a tenth of it is kept apart to judge by.
        how: how much to do.
        dtype: compute type of both models.
        command: command line to record.
        track: progress.

    Raises :class:`InputError` for another model's original and where both do not fit in memory, :class:`ModelError`
    where a router is no linear map, and what reading and writing packed folders raises.
    """
    folder, calibration = Path(folder), calibration or Calibration()
    restored(folder)
    manifest, opened = read_manifest(folder), open_model(model)
    check_routers(opened.spec)
    if manifest.inventory.fingerprint != opened.inventory.fingerprint:
        raise InputError(
            f"{model} is not the original of {folder}: their shapes differ; give the model that was packed"
        )
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    itemsize = (dtype or stored_dtype(opened.source)).itemsize
    if why := both_in_memory(opened.inventory, itemsize, stored):
        raise InputError(f"{folder} cannot be aligned here: {why}; do it where there is more")
    training, heldout = split_texts(calibration, opened.source.path)
    opened = calibrated(opened, calibration, texts=training, track=track)
    found = align_folder(opened, folder, heldout, calibration, how or Alignment(), dtype, track)
    if found.kept:
        judgement = compared(opened, folder, heldout, calibration, dtype, track)
        write_json(folder / "mopeq" / "evaluation.json", judgement.to_json())
    if (run := folder / "mopeq" / "run.json").is_file():
        record = read_json(run)
        commands = [*record["commands"], *filter(None, [command])]
        write_json(run, {**record, "commands": commands, "aligned": found.sentence})
    return found


def check_routers(spec: MoESpec) -> None:
    """Raise :class:`InputError` for layers with two sets of experts, whose routers files have in another form."""
    if any(layer.dealer for layer in spec.layers):
        raise InputError(
            f"a {spec.model_type} has two routers in a layer; expected one, which can be aligned; leave alignment out"
        )


def align_folder(
    opened: Prepared,
    folder: Path,
    heldout: Sequence[Any],
    calibration: Calibration,
    how: Alignment,
    dtype: torch.dtype | None,
    track: Track,
) -> Aligned:
    """Align a packed folder with its calibrated original, judged by what the final comparison leaves of ``heldout``."""
    original = load_source(opened.source, dtype)
    packed = load(folder, dtype=original.dtype)
    keys = stored_keys(packed, opened.spec, how)
    test = spare_batches(opened, heldout, calibration)
    with judged(original, opened, heldout, calibration, track=track) as judge:
        found = aligned(original, packed, opened.spec, opened.batches, test, judge, how, calibration.seed, track)
    if found.kept:
        parameters = dict(packed.named_parameters())
        changed = {key: parameters[name].detach() for name, key in keys.items()}
        with_tensors(folder, changed, without=("mopeq/evaluation.json", "mopeq/report.html", ALIGNED))
    write_json(folder / ALIGNED, found.to_json())
    return found


def aligned(
    original: nn.Module,
    packed: nn.Module,
    spec: MoESpec,
    batches: Sequence[Batch],
    test: Sequence[Batch],
    judge: Callable[[nn.Module], Divergence],
    how: Alignment,
    seed: int = 0,
    track: Track = silent,
) -> Aligned:
    """Align a model in place where that helps, and say what it did.

    batches: what it is fitted to. test, judge: other text, on which choices are counted, and which decides.
    """
    started = time.perf_counter()
    names = stored_keys(packed, spec, how)
    parameters = {name: p for name, p in packed.named_parameters() if name in names}
    was = {name: p.detach().clone() for name, p in parameters.items()}
    theirs = _choices(original, spec, test, track)
    shares = [_agreement(theirs, _choices(packed, spec, test, track))]
    kl = [judge(packed)]
    if how.steps:
        _fit(original, packed, spec, batches, how.steps, seed, track)
    if how.tune:
        _tune(original, packed, list(parameters.values()), batches, how.tune, track)
    shares.append(_agreement(theirs, _choices(packed, spec, test, track)))
    kl.append(judge(packed))
    gain = paired_difference(kl[1], kl[0])
    kept = gain.excludes_zero and gain.value < 0
    if not kept:
        for name, p in parameters.items():
            p.data.copy_(was[name])
    return Aligned(
        kept=kept,
        before=sum(shares[0].values()) / len(shares[0]),
        after=sum(shares[1].values()) / len(shares[1]),
        layers={index: (shares[0][index], shares[1][index]) for index in theirs},
        kl_before=kl[0].kl.value,
        kl_after=kl[1].kl.value,
        difference=gain,
        windows=len(kl[0].window_tokens),
        seconds=round(time.perf_counter() - started, 1),
    )


def likeliest(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The m = k + (n - k) / 2 largest of the logits (tokens, n) of n experts, of which k are chosen, and which."""
    found = logits.topk(top_k + (logits.shape[-1] - top_k) // 2, -1)
    return found.values, found.indices


def router_loss(logits: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """Mean over tokens of KL(softmax of ``values`` || softmax of the logits at ``index``), nats.

    logits: (tokens, n) of a router. values, index: (tokens, m), the original's, as :func:`likeliest` gives them.
    """
    made, wanted = logits.gather(-1, index).log_softmax(-1), values.log_softmax(-1)
    return (wanted.exp() * (wanted - made)).sum(-1).mean()


def fitted(
    weight: Tensor, bias: Tensor | None, hidden: Tensor, values: Tensor, index: Tensor, steps: int, seed: int = 0
) -> Tensor:
    """A router's weight (n, H), float32, after some steps of Adam on :func:`router_loss` at its inputs (tokens, H)."""
    made = weight.detach().float().clone().requires_grad_()
    offset = None if bias is None else bias.detach().float()
    rate = RATE * float(made.detach().square().mean().sqrt())
    adam = torch.optim.Adam([made], lr=rate)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        some = torch.randint(len(hidden), (min(ROWS, len(hidden)),), generator=draw).to(hidden.device)
        adam.param_groups[0]["lr"] = rate * (1 - step / steps)
        with torch.enable_grad():
            logits = nn.functional.linear(hidden[some].float(), made, offset)
            loss = router_loss(logits, values[some], index[some])
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return made.detach()


def stored_keys(model: nn.Module, spec: MoESpec, how: Alignment) -> dict[str, str]:
    """``{name of the parameter: name in the files}`` of what alignment changes: routers, and norms if it tunes.

    Raises :class:`ModelError` for a router that is no linear map, and for a norm that goes by another name in files.
    """
    found = {}
    for layer in spec.layers:
        _router(model, layer)
        shape = (len(layer.experts), layer.hidden_size)
        keys = [r.key for r in spec.kept
                if r.group == "router" and r.shape == shape and decoder_layer(r.key, layer) == layer.index]  # fmt: skip
        if len(keys) != 1:
            raise ModelError(f"layer {layer.index} has {len(keys)} routers {list(shape)} in its files; expected one")
        found[f"{layer.router}.weight"] = keys[0]
    if how.tune:
        first, parameters = spec.layers[0], dict(model.named_parameters())
        prefix = first.router.partition("layers.")[0]
        for ref in (r for r in spec.kept if r.group == "norm"):
            number = decoder_layer(ref.key, first)
            tail = ref.key.partition(f".{number}.")[2] if number is not None else ".".join(ref.key.split(".")[-2:])
            name = f"{prefix}layers.{number}.{tail}" if number is not None else f"{prefix}{tail}"
            if name not in parameters or parameters[name].shape != ref.shape:
                raise ModelError(f"no parameter {name} for the norm {ref.key} in the files; align without tuning norms")
            found[name] = ref.key
    return found


def _router(model: nn.Module, layer: MoELayer) -> Any:
    """A router with a weight (experts, hidden)."""
    router: Any = model.get_submodule(layer.router)
    weight = getattr(router, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != (len(layer.experts), layer.hidden_size):
        raise ModelError(
            f"{layer.router} is a {type(router).__name__} without a weight of {len(layer.experts)} x "
            f"{layer.hidden_size}; only linear routers can be aligned"
        )
    return router


def _choices(model: nn.Module, spec: MoESpec, batches: Sequence[Batch], track: Track) -> dict[int, Tensor]:
    """The experts (tokens, k) that each layer's router chooses."""
    return {index: seen.index for index, seen in observe(model, spec, batches, track=track).items()}


def _agreement(theirs: Mapping[int, Tensor], ours: Mapping[int, Tensor]) -> dict[int, float]:
    """Of each layer, the share of the first choices (tokens, k) that the second has too."""
    same = {index: (row[:, :, None] == ours[index][:, None]).any(-1)[row >= 0] for index, row in theirs.items()}
    return {index: float(found.double().mean()) for index, found in same.items()}


def _fit(
    original: nn.Module, packed: nn.Module, spec: MoESpec, batches: Sequence[Batch], steps: int, seed: int, track: Track
) -> None:
    """Fit every router in place."""
    wanted = {}
    for index, seen in observe(original, spec, batches, track=track).items():
        layer = spec.layer(index)
        router = _router(original, layer)
        logits = nn.functional.linear(seen.hidden.to(router.weight), router.weight.detach(), _bias(router))
        wanted[index] = likeliest(logits.float(), layer.top_k)
    reads = observe(packed, spec, batches, track=track)
    for layer in track(spec.layers, "align routers", len(spec.layers)):
        router = _router(packed, layer)
        hidden = reads[layer.index].hidden.to(router.weight.device)
        values, chosen = (part.to(hidden.device) for part in wanted[layer.index])
        router.weight.data.copy_(fitted(router.weight, _bias(router), hidden, values, chosen, steps, seed))


def _bias(router: Any) -> Tensor | None:
    bias: Any = getattr(router, "bias", None)
    return bias.detach() if isinstance(bias, nn.Parameter) else None


def _tune(
    original: nn.Module, packed: nn.Module, trained: list[nn.Parameter], batches: Sequence[Batch], rate: float,
    track: Track,
) -> None:  # fmt: skip
    """One pass of Adam, in float32, over the text, on the KL between all logits."""
    masters = [p.detach().float().clone() for p in trained]
    adam = torch.optim.Adam(masters, lr=rate)
    device = trained[0].device
    with frozen(packed, trained), frozen(original):
        for number, batch in enumerate(track(batches, "tune norms and routers", len(batches))):
            adam.param_groups[0]["lr"] = rate * (1 - number / len(batches))
            kept, given = token_mask(batch).to(device), inputs_of(batch, device)
            with torch.no_grad():
                wanted = logits_of(original, given)[kept].float().log_softmax(-1)
            with torch.enable_grad():
                made = logits_of(packed, given)[kept].float().log_softmax(-1)
                loss = (wanted.exp() * (wanted - made)).sum(-1).mean()
            for master, gradient in zip(masters, torch.autograd.grad(loss, trained), strict=True):
                master.grad = gradient.float()
            adam.step()
            for master, p in zip(masters, trained, strict=True):
                p.data.copy_(master)
