"""A folder or hub id to a model: packed by mopeq, or as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mopeq.autoload import callable_module, extend
from mopeq.checkpoint import Manifest, read_manifest
from mopeq.errors import CheckpointError, ModelError
from mopeq.garbage import uncollected
from mopeq.source import Source, read_tensor

__all__ = [
    "auto_class",
    "is_packed",
    "load",
    "load_original",
    "load_processor",
    "load_source",
    "load_tokenizer",
    "model_config",
    "takes_images",
]


def load(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Any:
    """A packed checkpoint as a transformers model, in evaluation mode, its weights still packed.

    Args:
        path: folder or hub id of a packed checkpoint.
        dtype: type of activations and of what is not packed; None takes the checkpoint's.
        device: where to; None is the CPU.

    Raises:
        CheckpointError: the checkpoint breaks docs/format.md.
        ModelError: there is no such folder.
    """
    if Path(path).is_dir():
        read_manifest(path)
    config = model_config(path)
    Manifest.from_json(getattr(config, "quantization_config", None))
    from mopeq.integrations import transformers  # noqa: F401  (registers the quantizer, whatever autoload was told)

    return _load(path, config, CheckpointError, dtype, device)


def load_original(
    path: str | Path,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """An original checkpoint as a transformers model, in evaluation mode.

    Args:
        path: folder or hub id.
        dtype: type of its weights; None takes the checkpoint's.
        attn_implementation: transformers' name, ``eager`` or ``sdpa`` for example.
        experts_implementation: transformers' name, ``eager`` or ``grouped_mm`` for example.
        device: where to; None is the CPU.

    Raises:
        ModelError: no such model, a packed one, or one whose tensors are not those of its architecture.
    """
    config = model_config(path)
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method") == "mopeq":
        raise ModelError(f"{path} is a packed checkpoint; expected an original model; load it with mopeq.load")
    options = {"attn_implementation": attn_implementation, "experts_implementation": experts_implementation}
    return _load(path, config, ModelError, dtype, device, **{k: v for k, v in options.items() if v is not None})


def load_source(source: Source, dtype: torch.dtype | None = None) -> Any:
    """An opened checkpoint as :func:`load_original` loads it; one that another quantizer packed is dequantized."""
    if not source.packed:
        return load_original(source.path, dtype=dtype)
    config = model_config(source.path)
    del config.quantization_config
    state = {key: read_tensor(source, key) for key in source.shapes}
    return _load(source.path, config, ModelError, dtype or config.dtype, None, state_dict=state)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model. Raises :class:`ModelError` where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} has no tokenizer that transformers can load: {_line(error)}") from error
    if not tokenizer("a")["input_ids"]:  # where there are no files, transformers makes one without a vocabulary
        raise ModelError(
            f"{path} has no tokenizer that transformers can load: its vocabulary is empty; add tokenizer.json"
        )
    return tokenizer


def load_processor(path: str | Path) -> Any:
    """The processor of a model that takes images, packed or not.

    Raises :class:`ModelError` where there is none, or one whose tokens the model's vocabulary does not have.
    """
    config = model_config(path)
    if not hasattr(config, "vision_config"):
        raise ModelError(f"{path} is a {config.model_type}, which takes no images; expected a vision-language model")
    from transformers.models.auto import processing_auto

    extend(processing_auto)  # mopeq.models, whatever autoload was told
    auto: Any = processing_auto.AutoProcessor
    try:
        processor = auto.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{path} has no processor that transformers can load: {_line(error)}") from error
    if not hasattr(processor, "tokenizer"):
        raise ModelError(f"{path} has no processor_config.json or preprocessor_config.json; add the model's own file")
    largest, rows = max(processor.tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {path}, with the special tokens of its model, has token {largest}; expected them below "
            f"{rows}, the model's vocabulary; give the model's own tokenizer files"
        )
    return processor


def takes_images(path: str | Path) -> bool:
    """Whether a folder or hub id is a vision-language model."""
    return hasattr(model_config(path), "vision_config")


def is_packed(path: str | Path) -> bool:
    """Whether a folder or hub id is a packed checkpoint, whole or not."""
    settings = getattr(model_config(path), "quantization_config", None)
    return isinstance(settings, dict) and settings.get("quant_method") == "mopeq"


def model_config(path: str | Path) -> Any:
    """The configuration of a model, as transformers reads it."""
    if not Path(path).is_dir() and (isinstance(path, Path) or path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ModelError(f"no folder {path}; expected a model's folder or its name on the Hugging Face hub")
    from transformers import AutoConfig
    from transformers.models.auto import configuration_auto

    extend(configuration_auto)  # mopeq.models, whatever autoload was told
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"transformers cannot read the configuration of {path}: {_line(error)}") from error


def auto_class(config: Any) -> Any:
    """Transformers' class that makes the model of a configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


@uncollected()
def _load(
    path: str | Path, config: Any, failure: type[ModelError] | type[CheckpointError], dtype: torch.dtype | None,
    device: str | torch.device | None, **options: Any,
) -> Any:  # fmt: skip
    """``from_pretrained`` with the right class; every weight must come from the files.

    Every tensor of a packed checkpoint must be used; what transformers drops of an original one, ``describe`` says.
    """
    made: Any = auto_class(config)
    if "state_dict" in options:  # then transformers wants the class itself, and no path
        with torch.device("meta"):
            made = type(made.from_config(config))
    try:
        model, info = made.from_pretrained(
            None if "state_dict" in options else path,
            config=config,
            dtype=dtype or "auto",
            device_map=None if device is None else {"": device},
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise failure(f"transformers cannot load {path}: {_line(error)}") from error
    problems = {"missing_keys": "are missing from it", "mismatched_keys": "have other shapes in it"}
    if failure is CheckpointError:
        problems["unexpected_keys"] = "in it belong to no weight of the model"
    for kind, problem in problems.items():
        names = sorted(str(name) for name in info[kind])
        if names:
            raise failure(f"{path}: {len(names)} tensors {problem}, the first is {names[0]}; download or make it again")
    return model


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


callable_module(__name__, load)
