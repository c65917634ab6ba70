"""The one place where a precision map is applied to a model: walk the manifest, replace modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from mopeq.checkpoint import Manifest
from mopeq.errors import CheckpointError, InputError
from mopeq.kernels.layout import GroupLayout
from mopeq.precision import FULL, GROUPS
from mopeq.runtime.experts import MixedExperts, pack_experts
from mopeq.runtime.linear import QLinear

__all__ = ["install", "packed_modules"]


def install(model: nn.Module, manifest: Manifest) -> list[str]:
    """Replace the modules that a packed checkpoint stores packed, in place; returns their names.

    Packed buffers are left unfilled, on the device of the weights they replace (``meta`` while transformers loads). A
    base model without head (``AutoModel``) skips the head's matrices. Raises :class:`CheckpointError` where a module is
    missing, of another shape, or shares its weight with another one.
    """
    done: list[str] = []
    for part in model.modules():
        if hasattr(part, "save_pretrained"):
            part.hf_quantizer = _NotSaved()  # type: ignore[assignment]  # transformers replaces the whole model's
    for index, packed in manifest.experts.items():
        shapes = manifest.inventory.layers[index]
        layouts = {g: GroupLayout(manifest.precisions.experts[g][index], shapes.matrices(g)) for g in GROUPS}
        name = _find(model, packed.module)
        if name is None:
            raise CheckpointError(_absent(model, packed.module))
        pack_experts(model.get_submodule(name), index, layouts)
        done.append(name)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {*tied, *tied.values()}
    for module, linear in manifest.linears.items():
        if linear.precision == FULL:
            continue
        name = _find(model, module)
        if name is None:
            if _is_headless(model) and not module.startswith(f"{_prefix(model)}."):
                continue
            raise CheckpointError(_absent(model, module))
        old: Any = model.get_submodule(name)
        if not isinstance(old, nn.Linear) or tuple(old.weight.shape) != linear.shape:
            shape = list(getattr(getattr(old, "weight", None), "shape", []))
            raise CheckpointError(
                f"{name} is {type(old).__name__} {shape}; the checkpoint has a Linear {list(linear.shape)}"
            )
        if f"{name}.weight" in shared:
            raise CheckpointError(
                f"{name}.weight is tied to another tensor in this model; the checkpoint packs it apart"
            )
        parent, _, child = name.rpartition(".")
        out, inp = linear.shape
        setattr(model.get_submodule(parent), child, QLinear(inp, out, linear.precision, old.bias, old.weight.device))
        done.append(name)
    return done


class _NotSaved:
    """Stands where ``save_pretrained`` looks for the quantizer that knows the names on disk, and finds none.

    Parts of a loaded model, and a model packed by hand, would be written under names that nothing reads.
    """

    @property
    def quantization_config(self) -> Any:
        """Asked for when transformers refuses to save."""
        raise InputError(
            "save_pretrained was asked of a part of a packed model, or of one that from_pretrained did not make; "
            "expected the whole model as it was loaded"
        )


def packed_modules(model: nn.Module) -> dict[str, MixedExperts | QLinear]:
    """The packed modules of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MixedExperts | QLinear)}


def _prefix(model: nn.Module) -> str:
    return str(getattr(model, "base_model_prefix", ""))


def _is_headless(model: nn.Module) -> bool:
    return bool(_prefix(model)) and not hasattr(model, _prefix(model))


def _find(model: nn.Module, name: str) -> str | None:
    """``name`` as this model has it, or as its base model does."""
    prefix = _prefix(model)
    for candidate in (name, name.removeprefix(f"{prefix}.")):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def _absent(model: nn.Module, module: str) -> str:
    return (
        f"{type(model).__name__} has no module {module}, which the checkpoint packs; load it with the class that "
        f"config.json names under architectures"
    )
