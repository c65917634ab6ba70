"""The transformers quantizer ``mopeq``: ``AutoModelForCausalLM.from_pretrained(DIR)`` gives a packed model.

Importing this module registers it; ``import torch`` arranges for that (autoload.py). In ``from_pretrained``, the model
is built without memory; :meth:`MopeqHfQuantizer._process_model_before_weight_loading` checks the files and swaps
modules; transformers reads tensors, renames them, and hands the experts' to :class:`FlatConcat`; afterwards every
packed buffer must have come from a file, because transformers replaces what is missing by uninitialised memory.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mopeq.checkpoint import Manifest, check_packed, read_headers, rest_elements
from mopeq.errors import CheckpointError, InputError
from mopeq.kernels.layout import PARTS
from mopeq.memory import in_large_pages
from mopeq.precision import GROUPS, ProjectionGroup
from mopeq.runtime.experts import MixedExperts
from mopeq.runtime.install import install, packed_modules
from mopeq.runtime.packed import prepare
from mopeq.runtime.stepping import take_steps

__all__ = ["FlatConcat", "FlatSplit", "MopeqConfig", "MopeqHfQuantizer"]

_BUFFER = re.compile(rf"(?:^|\.)({'|'.join(GROUPS)})_({'|'.join(PARTS)})\Z")


@register_quantization_config("mopeq")
class MopeqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint; :class:`CheckpointError` where it breaks docs/format.md."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method: Any = "mopeq"
        self.manifest = Manifest.from_json(fields)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``config.json``."""
        return self.manifest.to_json()


@register_quantizer("mopeq")
class MopeqHfQuantizer(HfQuantizer):
    """Loads packed checkpoints; makes none (that is ``mopeq quantize``)."""

    requires_calibration = True
    _fewer = False
    """Whether the files have fewer elements outside packed matrices than were packed."""
    quantization_config: MopeqConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what packed buffers cannot do."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise InputError("device_map puts packed modules on disk; expected devices and cpu; leave disk out")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Never: nothing is quantized while loading."""
        return False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        manifest = self.quantization_config.manifest
        if checkpoint_files:
            headers = read_headers(checkpoint_files)
            check_packed(manifest, headers)
            self._fewer = rest_elements(manifest, headers) < manifest.inventory.kept_parameters
        install(model, manifest)
        self._made = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
        return model

    def get_weight_conversions(self) -> list[WeightConverter]:
        """One converter for each flat buffer; patterns name the experts' parent too, or shared experts would match."""
        made: list[WeightConverter] = []
        kinds = {
            (".".join(e.module.split(".")[-2:]), e.names) for e in self.quantization_config.manifest.experts.values()
        }
        for path, (gate, up, down) in sorted(kinds):
            for part in PARTS:
                for group, names in (("gate_up", (gate, up)), ("down", (down,))):
                    sources = [f"{path}.*.{name}.{part}" for name in names]
                    made.append(_Converter(sources, f"{path}.{group}_{part}", [FlatConcat()]))
        return made

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in packed_modules(model).items():
            if isinstance(module, MixedExperts) and module.mopeq_faults:
                raise CheckpointError(module.mopeq_faults[0])
            for part, stored in module.named_buffers(recurse=False):
                if not getattr(stored, "_is_hf_initialized", False):
                    raise CheckpointError(f"{name}.{part} was not loaded: its tensors are missing from the checkpoint")
        if self._fewer:
            self._check_rest(model)
        self._settle(model)
        self._release_files(model)
        prepare(model)
        take_steps(model)
        return model

    def _check_rest(self, model: Any) -> None:
        """Files with fewer tensors than were packed: transformers would initialise the others and only list them.

        A tensor that is tied to another one may be left out, and a head that is new has nothing to do with the files.
        """
        missing = [name for name, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensors are missing from the checkpoint, the first is {missing[0]}; "
                "download or make it again"
            )

    def _settle(self, model: Any) -> None:
        """Shapes and types of the other parameters as the model was made, which transformers before 5.20 leaves open.

        It compares no shapes in a quantized model, and leaves a renamed parameter in the type of its file.
        """
        float32 = [*(getattr(model, f"_keep_in_fp32_modules{s}", None) or () for s in ("", "_strict"))]
        kept = re.compile("|".join(name for names in float32 for name in names) or r"(?!)")
        for name, parameter in model.named_parameters():
            shape, dtype = self._made.get(name, (parameter.shape, parameter.dtype))
            if parameter.shape != shape:
                raise CheckpointError(
                    f"tensor {name} is {[*parameter.shape]} in the checkpoint, the model has {[*shape]}"
                )
            if parameter.dtype != dtype and not kept.search(name):
                parameter.data = parameter.data.to(dtype)

    def _release_files(self, model: Any) -> None:
        """Copy what lies in a mapped file, so that the file, most of it packed already, leaves memory.

        A buffer is replaced as a whole: as a view it would keep its base alive.
        """
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                parameter.data = _copied(parameter.data)
        for module in model.modules():
            for name, buffer in [] if isinstance(module, MixedExperts) else list(module.named_buffers(recurse=False)):
                if buffer.device.type == "cpu":
                    module._buffers[name] = _copied(buffer)

    def is_serializable(self, **kwargs: Any) -> bool:
        """``save_pretrained`` writes the same tensors that were read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed weights are, and 16-bit parameters; codes have no gradients, inputs have."""
        return True

    def _dequantize(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError("a packed model was to be dequantized in memory; expected it to run packed; load the original")


class _Converter(WeightConverter):
    """One that copies fast: transformers deep-copies it for every tensor of a checkpoint, thousands of experts'."""

    __slots__ = ()

    def __deepcopy__(self, memo: Any) -> _Converter:
        made = copy.copy(self)
        made.collected_tensors, made.layer_targets = defaultdict(list), defaultdict(set)
        return made


class FlatConcat(ConversionOps):
    """One part's tensors of all experts, of different sizes, to a flat buffer: expert after expert, gate, then up."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Fill a new buffer. A fault is kept for after loading: transformers would report it and go on."""
        module, group, part = _buffer(kwargs["model"], kwargs["full_layer_name"])
        columns = [_listed(input_dict.pop(pattern, [])) for pattern in source_patterns]
        try:
            return {target_patterns[0]: _flatten(module, group, part, columns)}
        except CheckpointError as error:
            module.mopeq_faults.append(f"{kwargs['full_layer_name']}: {error}")
            return {}

    @property
    def reverse_op(self) -> ConversionOps:
        """For saving."""
        return FlatSplit()


class FlatSplit(ConversionOps):
    """A flat buffer to the tensors that a checkpoint stores, under their whole names."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Views of the buffer."""
        model = kwargs["model"]
        ((source, tensors),) = input_dict.items()
        (flat,) = _listed(tensors)
        path = kwargs["full_layer_name"].partition(".*.")[0]
        modules = {e.tensors: e.module for e in model.config.quantization_config.manifest.experts.values()}
        module, group, part = _buffer(model, f"{modules.get(path, path)}.{source.rpartition('.')[2]}")
        names = [pattern.split(".")[-2] for pattern in target_patterns]
        layout = module.mopeq_layouts[group]
        return {
            f"{path}.{expert}.{name}.{part}": view
            for expert in range(len(layout.precisions))
            for name, view in zip(names, layout.views(flat, part, expert), strict=False)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        """For loading."""
        return FlatConcat()


def _copied(tensor: Tensor) -> Tensor:
    return cast(Tensor, in_large_pages(torch.empty_like(tensor)).copy_(tensor))


def _listed(tensors: Any) -> list[Tensor]:
    return [*tensors] if isinstance(tensors, list) else [tensors]


def _buffer(model: Any, name: str) -> tuple[MixedExperts, ProjectionGroup, str]:
    """Module, projection group and part of a flat buffer's full name."""
    path, _, leaf = name.rpartition(".")
    found = _BUFFER.search(leaf)
    module = model.get_submodule(path)
    if found is None or not isinstance(module, MixedExperts):
        raise CheckpointError(f"{name} is no packed buffer")
    return module, cast(ProjectionGroup, found[1]), found[2]


def _flatten(module: MixedExperts, group: ProjectionGroup, part: str, columns: list[list[Tensor]]) -> Tensor:
    """Columns (gate's and up's, or down's tensors, of the experts that have the part, in order) to one buffer."""
    layout = module.mopeq_layouts[group]
    having = [e for e in range(len(layout.precisions)) if layout.parts(e, part)]
    for column in columns:
        if len(column) != len(having):
            raise CheckpointError(f"{len(column)} tensors; expected one for each of {len(having)} experts")
    flat: Tensor = in_large_pages(torch.empty(layout.size(part), dtype=PARTS[part], device=columns[0][0].device))
    for number, expert in enumerate(having):
        for column, view in zip(columns, layout.views(flat, part, expert), strict=True):
            tensor = column[number]
            if tensor.shape != view.shape or tensor.dtype != view.dtype:
                raise CheckpointError(
                    f"expert {expert} has {tensor.dtype} {list(tensor.shape)}; expected {view.dtype} {list(view.shape)}"
                )
            view.copy_(tensor)
            column[number] = flat  # the loaded tensor is not needed any more
    return flat
