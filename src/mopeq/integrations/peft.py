"""LoRA adapters beside packed linears, trained with peft.

peft puts adapters on module types that it knows, and on those that a configuration brings along; :func:`lora` brings
:class:`~mopeq.runtime.linear.QLinear`. Routed experts are no linears: peft refuses to target them.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from peft import LoraConfig
from peft.tuners.lora import Linear

from mopeq.runtime.linear import QLinear

__all__ = ["LoraQLinear", "lora"]

Config = TypeVar("Config", bound=LoraConfig)


class LoraQLinear(Linear):  # type: ignore[misc]
    """peft's layer for ``nn.Linear``; it calls the packed linear and adds the adapter's part.

    What needs dense weights (merging, DoRA, initialisation from singular vectors) finds that there are none: an
    :class:`AttributeError` says so.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # peft warns of every type that a configuration brings
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            super().__init__(*args, **kwargs)


def lora(config: Config) -> Config:
    """Let a configuration target packed linears; returns it.

    ``get_peft_model(model, lora(LoraConfig(...)))`` trains adapters, ``PeftModel.from_pretrained(model, folder,
    config=lora(LoraConfig.from_pretrained(folder)))`` loads them. peft saves no module types, hence the second.
    """
    config._register_custom_module({QLinear: LoraQLinear})
    return config
