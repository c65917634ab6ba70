"""What flags say, as the library takes it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from mopeq.errors import InputError, OutputError
from mopeq.precision import LEFT_OUT, Precision, parse_precision
from mopeq.spec import Inventory

__all__ = [
    "calibration_of",
    "device_of",
    "dtype_of",
    "load_any",
    "new_file",
    "one_precision",
    "outside_of",
    "precisions_of",
    "rest_of",
    "sampling_of",
    "size_of",
    "usable",
]


def load_any(model: str, options: argparse.Namespace) -> Any:
    """A packed or an original model."""
    from mopeq.load import is_packed, load, load_original

    device = device_of(options)
    made = load(model, dtype_of(options), device) if is_packed(model) else load_original(model, dtype_of(options))
    return made.to(device) if device else made


def device_of(options: argparse.Namespace) -> str | None:
    """The device asked for, if this machine has it."""
    name: str | None = getattr(options, "device", None)
    return None if name is None else usable(name)


def usable(name: str) -> str:
    """A device's name, if this machine has it."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); give another, such as cpu") from error
    return name


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """How tokens are chosen."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
    return {name: getattr(options, name) for name in names}


def precisions_of(options: argparse.Namespace, model: Inventory, text: str | None = None) -> tuple[Precision, ...]:
    """What ``--levels``, or another text, names, in the groups, symmetry and rotation asked for."""
    (base,) = model.precisions([4], options.group_size, options.symmetric)
    base = replace(base, hadamard=getattr(options, "hadamard", False))
    return tuple(parse_precision(part, base) for part in (text or options.levels).split(",") if part.strip())


def one_precision(options: argparse.Namespace, model: Inventory) -> Precision:
    """The precision of ``--uniform``."""
    found = precisions_of(options, model, options.uniform) if options.uniform else ()
    if len(found) != 1 or found[0] == LEFT_OUT:
        raise InputError(f"--uniform {options.uniform!r}; expected one precision, such as 3 or 4g128s")
    return found[0]


def size_of(text: str | None) -> int | None:
    """Bytes of a size such as 8GB."""
    from mopeq.allocate import parse_budget

    if text is None:
        return None
    size = parse_budget(text)
    if size.kind != "bytes":
        raise InputError(f"--max-memory {text!r}; expected a size such as 8GB or 900MiB")
    return int(size.amount)


AUTO = "auto"
"""Among precisions outside the experts: those of the other groups are chosen."""


def outside_of(text: str) -> dict[str, Any]:
    """As :func:`rest_of`, and whether precisions of the other groups are to be chosen."""
    parts = [piece.strip() for piece in text.split(",")]
    return {"rest": rest_of(",".join(part for part in parts if part != AUTO)), "outside": AUTO in parts}


def rest_of(text: str) -> dict[str, Precision]:
    """Precisions of groups outside the experts, as in ``attention=4g64,lm_head=16``."""
    made = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, sign, value = part.partition("=")
        if part == AUTO:
            raise InputError("--rest auto tries maps on text, which mopeq quantize does with a budget; leave it out")
        if not sign:
            raise InputError(f"--rest {part!r}; expected GROUP=PRECISION, such as attention=4g64")
        if name.strip() in made:
            raise InputError(f"--rest names {name.strip()} twice; expected each group once")
        made[name.strip()] = parse_precision(value, Precision(8, 128, True))
    return made


def calibration_of(options: argparse.Namespace) -> Any:
    """Which text is run through the model."""
    from mopeq.measure import Calibration

    if options.data == "":
        raise InputError("--data is empty; expected a text or JSONL file; leave it out for the bundled text")
    return Calibration(options.data, options.samples, options.length, options.batch_size, options.seed,
                       options.modality_weight, options.balance, options.cost_share)  # fmt: skip


def dtype_of(options: argparse.Namespace) -> Any:
    """The type asked for; None for the checkpoint's."""
    import torch

    return getattr(torch, options.dtype) if options.dtype else None


def new_file(path: str) -> Path:
    """A file that can be written: its folder exists."""
    if not Path(path).resolve().parent.is_dir():
        raise OutputError(f"no folder {Path(path).parent} for {Path(path).name}; make it, or give another path with -o")
    if Path(path).is_dir():
        raise OutputError(f"{Path(path)} is a folder; expected the path of a file; give one with -o")
    return Path(path)
