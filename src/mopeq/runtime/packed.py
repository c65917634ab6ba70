"""What packed modules have in common: buffers that keep their types, and their form (kernels/layout.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.kernels import Form, PackedGroup, convert, selected
from mopeq.kernels.panels import from_panels

__all__ = ["PackedModule", "prepare"]


class PackedModule(nn.Module):
    """A module whose packed buffers are in plain form or in panels, in the same memory.

    Only the kernel sees panels: state dictionaries, saved files and other devices get and give the plain form.
    """

    mopeq_form: Form = "plain"

    def packed_groups(self) -> list[PackedGroup]:
        """Its packed matrices."""
        raise NotImplementedError

    def convert(self, form: Form) -> None:
        """Bring the buffers into a form, in place. The modules that :func:`prepare` takes have both forms."""
        if form != self.mopeq_form:
            for group in self.packed_groups():
                _turn(group, form)
            self.mopeq_form = form

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            # a cast of the model (model.to(torch.float32)) leaves packed buffers their types
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        devices = {b.device.type for b in self._buffers.values() if b is not None}
        if devices == {"meta"}:
            self.mopeq_form = "plain"
        elif devices != {"cpu"}:
            self.convert("plain")
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.mopeq_form == "panels":
            own = dict(self._buffers)
            try:
                self._buffers.update({name: b if b is None else b.clone() for name, b in own.items()})
                self.convert("plain")
                destination |= {f"{prefix}{name}": b for name, b in self._buffers.items() if b is not None}
            finally:
                self._buffers.update(own)
                self.mopeq_form = "panels"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        form = self.mopeq_form
        self.convert("plain")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers"):  # the buffers are the caller's now
            self._buffers.update({name: b if b is None else b.clone() for name, b in self._buffers.items()})
        self.convert(form)


def _turn(group: PackedGroup, form: Form) -> None:
    """In place, by the library where that can be."""
    if group.qweight.device.type == "cpu" and selected().name == "cpu":
        convert(group, form)
        return
    for expert in range(group.experts):
        for stored in group.stored(expert):
            plain = from_panels(stored)
            for part in ("qweight", "scales", "zeros"):
                if getattr(stored, part) is not None:
                    getattr(stored, part).copy_(getattr(plain, part))


def prepare(model: nn.Module) -> list[str]:
    """Bring a model's packed modules into the form of the selected kernel; returns the names of those in panels.

    To be called when the weights are there. Modules off the CPU, and all modules of a model that is only partly on it,
    stay plain. Needs the memory of one more matrix; takes no other.
    """
    if selected().name != "cpu" or {t.device.type for t in [*model.parameters(), *model.buffers()]} != {"cpu"}:
        return []
    done = []
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, PackedModule) and all(g.layout.has_panels for g in module.packed_groups()):
                module.convert("panels")
                done.append(name)
    return done
