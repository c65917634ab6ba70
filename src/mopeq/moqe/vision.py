"""Vision: variants of an image classifier with packed weights, and the set that routes images to them.

A convolution's weight (out, in, k, k) is the matrix (out, in * k * k) of the patches it reads, so the quantizers of
language models apply as they are; moments are those of the patches. Weights are stored packed, 8 bits or fewer, and
run in floating point: a set of image variants saves disk, not memory. transformers' ResNet needs no torchvision;
images are read with Pillow and prepared as ``preprocessor_config.json`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mopeq.errors import CheckpointError, DataError, InputError, ModelError
from mopeq.moqe.dense import input_moments
from mopeq.moqe.images import Images, preparation, read_images
from mopeq.moqe.judging import Judged, Scores, compare
from mopeq.moqe.make import known_calibration, workshop
from mopeq.moqe.pool import Pool
from mopeq.moqe.recipes import MIXED, Recipe, parse_recipes
from mopeq.moqe.router import ImageRouter, fitting_shape, make_router, parameters_of, read_router, write_router
from mopeq.moqe.store import VariantSet, combine, read_set, weight_bytes, write_set
from mopeq.moqe.training import Settings, Trained, finish, fit
from mopeq.precision import FULL, Precision, parse_precision
from mopeq.progress import Track, silent
from mopeq.qtensor import QTensor, dequantize, pack
from mopeq.quantize import require_new
from mopeq.quantizers import QUANTIZERS
from mopeq.spec import fitting
from mopeq.stats import read_json, write_json

__all__ = [
    "MoqeImages",
    "build_images",
    "classify",
    "is_image_model",
    "judge_images",
    "load_images",
    "train_images",
]

METHOD = "mopeq-images"
BATCH = 64


def is_image_model(model: str | Path) -> bool:
    """Whether a local folder holds an image classifier that this module handles."""
    file = Path(model) / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "resnet"


# --- variants


def build_images(
    model: str | Path,
    variants: Sequence[str],
    out: str | Path,
    images: str | Path | None = None,
    *,
    limit: int = 512,
    command: str = "",
    track: Track = silent,
) -> VariantSet:
    """Variants of an image classifier, as :func:`mopeq.moqe.build` makes them of a language model.

    Args:
        model: folder of a ``ResNetForImageClassification``.
        variants: in the same grammar; bits without a group size are per output channel, ``@FOLDER`` names images.
        out: folder to make.
        images: calibration images of the variants that name none.
        limit: most images of a calibration, evenly spread.
        command: command line to record.
        track: progress.
    """
    recipes = parse_recipes(variants)
    require_new(Path(out))
    model = Path(model)
    whole = _full_model(model)
    state = whole.state_dict()
    seen: set[str] = set()
    with workshop(Path(out)) as (partial, made):
        folders = {}
        for recipe in track(recipes, "make variants", len(recipes)):
            if recipe.method == MIXED:
                raise InputError(f"variant {recipe.text!r}: mixed is for mixture-of-experts models; use gptq-4bit")
            if recipe.folder is not None:
                _check_same(recipe, state)
                seen |= known_calibration(recipe.folder)
                folders[recipe.name] = recipe.folder
                continue
            moments: dict[str, Tensor] = {}
            if recipe.calibrated:
                found = _calibration(recipe, images, model)
                seen |= set(found.hashes)
                step = max(1, -(-len(found.pixels) // limit))
                parts = torch.split(found.pixels[::step], BATCH)
                moments = input_moments(whole, _matrices(whole), ({"pixel_values": part} for part in parts))
            folders[recipe.name] = made / recipe.name
            _write_variant(whole, model, recipe, moments, made / recipe.name)
        stored, size, identity = combine(folders, partial, {r.name: r.text for r in recipes}, track)
        info = {
            "command": command,
            "parameters": sum(p.numel() for p in whole.parameters()),
            "original_bytes": sum(p.nbytes for p in state.values()),
        }
        write_set(
            VariantSet(partial, "vision", model.resolve().name, stored, size, identity, tuple(sorted(seen)), info),
            partial,
        )
    return read_set(out)


def _calibration(recipe: Recipe, images: str | Path | None, model: Path) -> Images:
    folder = recipe.data or images
    if folder is None:
        raise InputError(f"variant {recipe.text!r} needs calibration images; give --images DIR, or use rtn")
    return read_images(folder, model)


def _full_model(folder: Path) -> Any:
    from transformers import AutoModelForImageClassification

    try:
        return AutoModelForImageClassification.from_pretrained(folder).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"transformers cannot load the image classifier {folder}: {str(error).splitlines()[0]}"
        ) from error


def _matrices(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Convolutions that read all channels, and linear layers."""
    kinds = (nn.Conv2d, nn.Linear)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and getattr(module, "groups", 1) == 1
    }


def _write_variant(whole: Any, source: Path, recipe: Recipe, moments: Mapping[str, Tensor], out: Path) -> None:
    asked = parse_precision(recipe.level, Precision(4, -1))
    stored = dict(whole.state_dict())
    precisions: dict[str, str] = {}
    for name, module in _matrices(whole).items():
        weight = module.weight.detach().float().flatten(1)
        precision = fitting(asked, *weight.shape)
        if precision != FULL:
            seen = moments.get(name)
            codes = QUANTIZERS[recipe.quantizer](weight[None], precision, None if seen is None else seen[None])
            packed = pack(codes[0])
            del stored[f"{name}.weight"]
            parts = {part: getattr(packed, part) for part in ("qweight", "scales", "zeros")}
            stored |= {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
            precisions[name] = str(precision)
    out.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, out / "model.safetensors")
    config = read_json(source / "config.json")
    write_json(out / "config.json", {**config, "quantization_config": {"quant_method": METHOD, "weights": precisions}})
    for file in sorted(source.glob("preprocessor_config.json")):
        (out / file.name).write_bytes(file.read_bytes())


def load_image_variant(folder: Path) -> Any:
    """A variant as ``ResNetForImageClassification``, its weights unpacked to float32, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForImageClassification

    raw = read_json(folder / "config.json")
    settings = raw.pop("quantization_config", None)
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        return _full_model(folder)
    config = AutoConfig.for_model(raw["model_type"], **{k: v for k, v in raw.items() if k != "model_type"})
    auto: Any = AutoModelForImageClassification
    model = auto.from_config(config)
    try:
        stored = {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}
        shapes = {name: module.weight.shape for name, module in _matrices(model).items()}
        for name, text in settings["weights"].items():
            shape = shapes[name]
            scales, zeros = stored.pop(f"{name}.scales"), stored.pop(f"{name}.zeros", None)
            codes = stored.pop(f"{name}.qweight")
            flat = (shape[0], shape[1:].numel())
            weight = dequantize(QTensor(codes, scales, zeros, flat, parse_precision(text)))
            stored[f"{name}.weight"] = weight.reshape(shape)
        model.load_state_dict(stored)
    except (KeyError, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder} is no whole image variant ({str(error).splitlines()[0]}); build it again"
        ) from error
    return model.eval()


def _check_same(recipe: Recipe, state: Mapping[str, Tensor]) -> None:
    """An existing variant has the shapes of the model, and its normalization, which is never quantized."""
    assert recipe.folder is not None
    found = load_image_variant(recipe.folder).state_dict()
    same = {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in state.items()}
    if not same or not all(torch.equal(found[k], t) for k, t in state.items() if "normalization" in k):
        raise ModelError(f"variant {recipe.name} in {recipe.folder} is of another model; give variants of one model")


# --- a set at work


class MoqeImages:
    """A router of images and its variants."""

    def __init__(self, made: VariantSet, pool: Pool) -> None:
        self.made, self.pool = made, pool
        self._router: ImageRouter | None = None

    @property
    def router(self) -> ImageRouter:
        """The router; :class:`InputError` where none is trained yet."""
        if self._router is None:
            router = read_router(self.made)[0]
            if not isinstance(router, ImageRouter):
                raise CheckpointError(f"the router of {self.made.path} is for text; train it again")
            self._router = router
        return self._router

    def route(self, pixels: Tensor) -> list[str]:
        """The variant for each image (n, channels, height, width)."""
        with torch.inference_mode():
            return [self.made.names[i] for i in self.router(pixels).argmax(1).tolist()]

    def logits(self, pixels: Tensor) -> Tensor:
        """(n, classes), each image through its own variant, images of one variant together."""
        routes = self.route(pixels)
        made: dict[int, Tensor] = {}
        for name in self.pool.ordered(routes):
            rows = [i for i, route in enumerate(routes) if route == name]
            with torch.inference_mode():
                made |= dict(zip(rows, self.pool(name)(pixel_values=pixels[rows]).logits, strict=True))
        return torch.stack([made[i] for i in range(len(routes))])


def load_images(path: str | Path, *, resident: int | None = None) -> MoqeImages:
    """A set of image variants; its router is read when it is first needed."""
    made = read_set(path)
    if made.kind != "vision":
        raise InputError(f"{path} is a set of {made.kind} variants; expected image classifiers; see mopeq.moqe.load")
    return MoqeImages(made, Pool({name: made.folder(name) for name in made.names}, load_image_variant, resident))


def train_images(
    path: str | Path,
    images: str | Path,
    *,
    settings: Settings | None = None,
    resident: int | None = 1,
    restart: bool = False,
    command: str = "",
    track: Track = silent,
) -> Trained:
    """Train the router of a set of image variants on images that calibrated none of them."""
    settings = settings or Settings()
    opened = load_images(path, resident=resident)
    made = opened.made
    found = read_images(images, made.folder(made.names[0]))
    _check_unseen(made, found)
    shuffled = torch.randperm(len(found.labels), generator=torch.Generator().manual_seed(settings.seed))
    pixels, labels = found.pixels[shuffled], found.labels[shuffled]  # folders are in order of class
    losses = torch.stack([_nats(_logits(opened.pool(name), pixels), labels) for name in made.names], 1)
    shape = fitting_shape("vision", pixels.shape[1], len(made.names), made.info["parameters"])
    router = make_router(shape, settings.seed)
    assert isinstance(router, ImageRouter)
    folder = made.path / "router"

    def inputs(numbers: Tensor) -> tuple[Tensor, ...]:
        return (pixels[numbers],)

    done = fit(router, inputs, losses, made.names, settings, folder, restart=restart, track=track)
    share = parameters_of(router) / made.info["parameters"]
    about = {"images": len(labels), "command": command}
    record = {"share": share, "settings": asdict(settings), "data": about, "validation": asdict(done)}
    write_router(router, made, record)
    finish(folder)
    return done


def judge_images(
    opened: MoqeImages,
    domains: Mapping[str, str | Path],
    *,
    beside: Mapping[str, str | Path] | None = None,
    seed: int = 0,
) -> tuple[Judged, Judged]:
    """A set on image folders by domain: by mean loss, and by the share of images classified wrongly."""
    made = opened.made
    found = {name: read_images(folder, made.folder(made.names[0])) for name, folder in domains.items()}
    for part in found.values():
        _check_unseen(made, part)
    pixels = torch.cat([part.pixels for part in found.values()])
    labels = torch.cat([part.labels for part in found.values()])
    origin = tuple(name for name, part in found.items() for _ in part.labels)
    routes = torch.tensor([made.names.index(name) for name in opened.route(pixels)])
    logits = {name: _logits(opened.pool(name), pixels) for name in made.names}
    others = {"ensemble": torch.stack(list(logits.values())).mean(0)}
    for name, folder in (beside or {}).items():
        others[name] = _logits(load_image_variant(Path(folder)), pixels)
    router_bytes = (made.path / "router" / "router.safetensors").stat().st_size
    sizes = {variant.name: variant.bytes for variant in made.variants}
    sizes |= dict.fromkeys(("routed", "random", "oracle", "best per domain", "ensemble"), made.bytes + router_bytes)
    sizes |= {name: weight_bytes(Path(folder)) for name, folder in (beside or {}).items()}

    def scored(measure: Callable[[Tensor, Tensor], Tensor]) -> Judged:
        variants = torch.stack([measure(logits[name], labels) for name in made.names], 1)
        rest = {name: measure(found, labels) for name, found in others.items()}
        return compare(Scores(made.names, variants, routes, torch.ones(len(labels)), origin, rest), sizes, seed=seed)

    return scored(_nats), scored(_wrong)


class Classified(NamedTuple):
    """An image, its likeliest class and how likely it is, and the variant that said so."""

    file: str
    label: str
    probability: float
    variant: str


def classify(opened: MoqeImages, files: Sequence[str | Path]) -> list[Classified]:
    """The class of each image file."""
    folder = opened.made.folder(opened.made.names[0])
    prepare = preparation(folder)
    pixels = torch.stack([prepare(Path(file)) for file in files])
    labels = read_json(folder / "config.json").get("id2label") or {}
    found = opened.logits(pixels).softmax(1).max(1)
    rows = zip(files, found.values.tolist(), found.indices.tolist(), opened.route(pixels), strict=True)
    return [Classified(str(file), str(labels.get(str(c), c)), p, variant) for file, p, c, variant in rows]


def _logits(model: Any, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(pixel_values=part).logits for part in torch.split(pixels, BATCH)]).double()


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def _wrong(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) != labels).double()


def _check_unseen(made: VariantSet, found: Images) -> None:
    seen = set(found.hashes) & set(made.calibration)
    if seen:
        raise DataError(
            f"{len(seen)} of {len(found.hashes)} images calibrated a variant, whose loss on them says little; "
            f"give other images"
        )
