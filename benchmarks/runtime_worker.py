"""A whole model in torch's bfloat16, or quantized by torchao or bitsandbytes, timed when it is told to.

    python benchmarks/runtime_worker.py torchao-int8 FOLDER

``cpu_runtime.py --peers`` starts it, in an environment that has mopeq and the peer. FOLDER holds the headers of an
original; its weights are drawn here. When the model is there it prints its bytes as a line of JSON; then, for each
line such as ``decode 2``, the seconds that a token or the prompt takes on so many threads, passed and of processor.

transformers keeps a layer's experts in two tensors of three axes. torchao's int8 takes these and runs with
transformers' ``eager`` experts; what only takes linears (torchao's int4, bitsandbytes) gets a linear for each matrix.
Tokens are decoded by mopeq's loop, which costs less than ``generate``.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpu_runtime import IMAGES, decoded, prefilled, prompt_of
from mopeq.evaluate.speed import process_bytes
from mopeq.load import load_original

LARGE = 1 << 24
"""Random numbers that all weights are taken from."""


class Linears(nn.Module):
    """A layer's experts as linears, called as transformers calls its own."""

    def __init__(self, experts: Any, made: Callable[[Tensor], nn.Module]) -> None:
        super().__init__()
        self.act_fn = experts.act_fn
        self.gate_up = nn.ModuleList(made(weight) for weight in experts.gate_up_proj.data)
        self.down = nn.ModuleList(made(weight) for weight in experts.down_proj.data)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Of x (tokens, hidden), with index and weights (tokens, k)."""
        out = torch.zeros_like(x)
        for expert in index.unique().tolist():
            token, slot = torch.where(index == expert)
            gate, up = self.gate_up[expert](x[token]).chunk(2, -1)
            one = self.down[expert](self.act_fn(gate) * up) * weights[token, slot, None]
            out.index_add_(0, token, one.to(out.dtype))
        return out


def plain(weight: Tensor) -> nn.Linear:
    """A linear of this weight (out, in)."""
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def text(model: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """What a token of text passes: the module above, the name there, the module itself."""
    for above, parent in list(model.named_modules()):
        if not above.startswith(IMAGES):
            yield from ((parent, name, child) for name, child in list(parent.named_children()))


def routed(model: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """The experts of transformers in it."""
    yield from (found for found in text(model) if getattr(found[2], "gate_up_proj", torch.empty(0)).dim() == 3)


def linears(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linears in it that torch made, without routers."""
    yield from (found for found in text(model) if type(found[2]) is nn.Linear and found[1] != "gate")


def torchao(config: Any, *, stacked: bool) -> Callable[[Any], None]:
    """Weights in torchao's ``config``; experts ``stacked`` as they are, or as linears."""

    def quantize(model: Any) -> None:
        from torchao.quantization import FqnToConfig, quantize_

        def quantized(linear: nn.Module) -> nn.Module:
            quantize_(linear, config)
            return linear

        for _, _, linear in linears(model):  # before there are more
            quantized(linear)
        for parent, name, experts in routed(model):
            if stacked:
                quantize_(experts, FqnToConfig({"gate_up_proj": config, "down_proj": config}), filter_fn=None)
            else:
                setattr(parent, name, Linears(experts, lambda weight: quantized(plain(weight))))

    return quantize


def bitsandbytes(made: Callable[[Tensor], nn.Module]) -> Callable[[Any], None]:
    """Every linear, an expert's matrix too, as one of bitsandbytes'."""

    def quantize(model: Any) -> None:
        for parent, name, experts in routed(model):
            setattr(parent, name, Linears(experts, made))
        for parent, name, linear in linears(model):
            setattr(parent, name, made(linear.weight.data))

    return quantize


def nf4(weight: Tensor) -> nn.Module:
    """The 4 bits of bitsandbytes."""
    import bitsandbytes as bnb

    linear = bnb.nn.Linear4bit(*weight.shape[::-1], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    linear.load_state_dict({"weight": weight})
    return linear.to("cpu")


def int8(weight: Tensor) -> nn.Module:
    """LLM.int8() of bitsandbytes."""
    import bitsandbytes as bnb

    linear = bnb.nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False)
    linear.load_state_dict({"weight": weight})
    return linear.to("cpu")


def torchao_int8(model: Any) -> None:
    """Int8 weights, a scale a row."""
    from torchao.quantization import Int8WeightOnlyConfig

    torchao(Int8WeightOnlyConfig(set_inductor_config=False), stacked=True)(model)


def torchao_int4(model: Any) -> None:
    """Int4 in groups of 64, by the one of torchao's formats that runs on a CPU; it takes no tensors of three axes."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    torchao(PrototypeInt4WeightOnlyConfig(group_size=64, set_inductor_config=False), stacked=False)(model)


PEERS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "torch-bfloat16": ("grouped_mm", lambda model: None),
    "torchao-int8": ("eager", torchao_int8),
    "torchao-int4": ("eager", torchao_int4),
    "bitsandbytes-nf4": ("eager", bitsandbytes(nf4)),
    "bitsandbytes-int8": ("eager", bitsandbytes(int8)),
}
"""transformers' implementation of experts, the fastest that runs, and what is done to the model."""


def draw(model: Any) -> None:
    """Normal numbers of deviation 0.02 in all matrices, ones in vectors."""
    numbers = torch.empty(LARGE, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    for count, weight in enumerate(model.parameters()):
        flat = weight.data.view(-1)
        if weight.dim() < 2:
            flat.fill_(1)
            continue
        for start in range(0, len(flat), LARGE):
            part = flat[start : start + LARGE]
            part.copy_(numbers.roll(997 * count + start // LARGE)[: len(part)])


def parts(tensor: Any) -> Iterator[Tensor]:
    """The tensors that a weight consists of: torchao's are of several, bitsandbytes' have theirs beside."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)
    yield from (value for value in (getattr(state, "absmax", None), getattr(tensor, "SCB", None)) if value is not None)


def active_bytes(model: Any) -> int:
    """Bytes of weights that a token of text reads; of the embedding one row, of the experts their share."""
    config, total = model.config.get_text_config(), 0.0
    chosen = config.num_experts_per_tok / (getattr(config, "num_experts", None) or config.n_routed_experts)
    for name, weight in model.named_parameters():
        if "embed_tokens" not in name and not name.startswith(IMAGES):
            total += sum(part.nbytes for part in parts(weight)) * (chosen if ".experts." in name else 1)
    return int(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    experts, quantize = PEERS[asked.peer]
    model = load_original(asked.folder, dtype=torch.bfloat16, experts_implementation=experts)
    with torch.no_grad():
        draw(model)
        quantize(model)
        print(json.dumps({"active bytes": active_bytes(model), "process": process_bytes()}), flush=True)
        for line in sys.stdin:
            what, threads = line.split()
            torch.set_num_threads(int(threads))
            call = functools.partial(decoded, native=False) if what == "decode" else prefilled
            passed, used = call(model, prompt_of())
            print(json.dumps({"passed": passed, "used": used}), flush=True)


if __name__ == "__main__":
    main()
