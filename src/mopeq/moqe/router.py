"""Routers: small networks that choose a variant for each input, from what is known before it is run.

The language router reads the prompt and nothing after it, and decides once for a sequence; the vision router reads the
image. Both follow MoQE (arXiv 2508.09204, section on routers) in structure; sizes follow the model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mopeq.errors import CheckpointError, InputError, MapError
from mopeq.moqe.store import VariantSet
from mopeq.stats import read_json, write_json

__all__ = ["ImageRouter", "PromptRouter", "RouterShape", "fitting_shape", "make_router", "read_router", "write_router"]

SHARE = 0.01
"""Most of the model's parameters that a router may have."""
WIDTHS = (256, 192, 128, 96, 64, 48, 32, 24, 16)
EDGE = 64
"""An image router sees at most so many pixels a side."""
FOLDER, CONFIG, WEIGHTS = "router", "router.json", "router.safetensors"
ROUTER_FORMAT, ROUTER_VERSION = "mopeq-router", 1


@dataclass(frozen=True)
class RouterShape:
    """Sizes of a router. ``inputs``: hidden size of the embedding, or channels of an image."""

    kind: str
    inputs: int
    variants: int
    width: int
    layers: int = 1
    heads: int = 4
    tokens: int = 128
    """A language router reads at most so many tokens: the last of the prompt."""


class PromptRouter(nn.Module):
    """Frozen embedding -> small transformer encoder -> attention pooling -> MLP.

    The embedding is the model's own and no part of the router: it gets embedded tokens.
    """

    def __init__(self, shape: RouterShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.enter = nn.Sequential(nn.LayerNorm(shape.inputs, elementwise_affine=False), nn.Linear(shape.inputs, width))
        layer = nn.TransformerEncoderLayer(
            width, shape.heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, shape.layers, enable_nested_tensor=False)
        self.score = nn.Linear(width, 1)
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, shape.variants)
        )
        self.register_buffer("positions", _positions(shape.tokens, width), persistent=False)

    def forward(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens, H) and mask (batch, tokens), True at tokens of the prompt, to logits (batch, variants)."""
        positions: Any = self.positions
        x = self.enter(embedded.float()) + positions[: embedded.shape[1]]
        x = self.encoder(x, src_key_padding_mask=~mask)
        weight = self.score(x).squeeze(-1).masked_fill(~mask, -math.inf).softmax(-1)
        logits: Tensor = self.head((weight.unsqueeze(-1) * x).sum(1))
        return logits


def _positions(tokens: int, width: int) -> Tensor:
    """Sines and cosines (tokens, width), Vaswani et al. 2017."""
    rate = torch.exp(-math.log(10_000) / width * torch.arange(0, width, 2))
    angle = torch.arange(tokens).unsqueeze(1) * rate
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


class ImageRouter(nn.Module):
    """Three convolutions -> three residual stages with squeeze and excitation -> attention over positions -> linear."""

    def __init__(self, shape: RouterShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        sizes = (shape.inputs, width, width, width)
        pairs = pairwise(sizes)
        self.stem = nn.Sequential(*(part for a, b in pairs for part in _conv(a, b)))
        self.stages = nn.Sequential(*(_Excited(width, stride) for stride in (1, 2, 2)))
        self.attention = nn.MultiheadAttention(width, shape.heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, shape.variants)

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, channels, height, width) to logits (batch, variants)."""
        if max(pixels.shape[-2:]) > EDGE:
            pixels = functional.adaptive_avg_pool2d(pixels, EDGE)
        x = self.stages(self.stem(pixels.float())).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        logits: Tensor = self.head(x.mean(1))
        return logits


def _conv(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(4, outputs), nn.ReLU()


class _Excited(nn.Module):
    """A residual block whose channels are weighed by what the whole image has in them (Hu et al. 2018)."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(width, width, stride), *_conv(width, width)[:2])
        squeezed = max(4, width // 4)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, width, 1),
            nn.Sigmoid(),
        )
        self.skip: nn.Module = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        out: Tensor = torch.relu(y * self.gate(y) + self.skip(x))
        return out


ROUTERS: Mapping[str, type[PromptRouter] | type[ImageRouter]] = {"language": PromptRouter, "vision": ImageRouter}


def make_router(shape: RouterShape, seed: int = 0) -> PromptRouter | ImageRouter:
    """A router with seeded weights; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ROUTERS[shape.kind](shape)


def parameters_of(router: nn.Module) -> int:
    """Weights of a router."""
    return sum(p.numel() for p in router.parameters())


def fitting_shape(kind: str, inputs: int, variants: int, model_parameters: int) -> RouterShape:
    """The widest router under 1 % of the model's parameters, or the narrowest where none is."""
    shapes = [RouterShape(kind, inputs, variants, width) for width in WIDTHS]
    with torch.device("meta"):
        fits = (s for s in shapes if parameters_of(ROUTERS[kind](s)) <= SHARE * model_parameters)
        return next(fits, shapes[-1])


def write_router(router: PromptRouter | ImageRouter, made: VariantSet, record: Mapping[str, Any]) -> None:
    """``DIR/router``: weights, then the file that says what they are."""
    folder = made.path / FOLDER
    folder.mkdir(exist_ok=True)
    beside = folder / f".{WEIGHTS}.partial"
    save_file({k: t.contiguous() for k, t in router.state_dict().items()}, beside)
    beside.replace(folder / WEIGHTS)
    write_json(
        folder / CONFIG,
        {
            "format": ROUTER_FORMAT,
            "version": ROUTER_VERSION,
            "set": made.id,
            "variants": list(made.names),
            "shape": asdict(router.shape),
            "parameters": parameters_of(router),
            **record,
        },
    )


def read_router(made: VariantSet) -> tuple[PromptRouter | ImageRouter, dict[str, Any]]:
    """The router of a set and what its file says.

    Raises :class:`InputError` where there is none or it is another set's, :class:`CheckpointError` where it is damaged.
    """
    folder = made.path / FOLDER
    if not (folder / CONFIG).is_file():
        raise InputError(f"{made.path} has no router yet; expected {folder / CONFIG}; train one with mopeq moqe train")
    try:
        record = read_json(folder / CONFIG)
        if record["format"] != ROUTER_FORMAT or record["version"] != ROUTER_VERSION:
            raise CheckpointError(f"{folder / CONFIG} has another format or version; use the mopeq that wrote it")
        if record["set"] != made.id:
            raise InputError(
                f"the router in {folder} was trained for the set {record['set']} of {_listed(record['variants'])}; "
                f"this set is {made.id} of {_listed(made.names)}; train one for it with mopeq moqe train"
            )
        router = make_router(RouterShape(**record["shape"]))
        router.load_state_dict(load_file(folder / WEIGHTS))
    except (MapError, KeyError, TypeError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"the router in {folder} is damaged ({reason}); train it again") from error
    return router.eval(), record


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
