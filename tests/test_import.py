"""What ``import mopeq`` costs and gives."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import mopeq
import packing
from mopeq.autoload import callable_module


def python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter; what it printed."""
    result = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True,
                            timeout=300, check=False, env={**os.environ, **environment})  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    packing.pack_model(tiny_model("olmoe"), out)
    return out


def test_import_is_cheap() -> None:
    heavy = (
        "torch",
        "transformers",
        "numpy",
        "scipy",
        "safetensors",
        "huggingface_hub",
        "rich",
        "lm_eval",
        "matplotlib",
    )
    assert python(f"import sys, mopeq; mopeq.Precision(3); print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_names() -> None:
    assert mopeq.__all__ == sorted(mopeq.__all__)
    assert {"Precision", "PrecisionMap", "Stats", "load", "quantize", "__version__"} <= set(mopeq.__all__)
    assert set(mopeq._HOME) | {"__version__"} == set(mopeq.__all__)
    assert set(mopeq.__all__) <= set(dir(mopeq))
    for name in mopeq.__all__:
        assert getattr(mopeq, name) is not None
    assert mopeq.Precision.__module__ == "mopeq.precision"
    with pytest.raises(AttributeError, match="module 'mopeq' has no attribute 'lode'"):
        mopeq.lode  # noqa: B018


def test_version() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert mopeq.__version__ == project["version"]


ORDERS = (
    "import mopeq; f = mopeq.load",
    "import mopeq.load; f = mopeq.load",
    "from mopeq.load import load as f",
    "from mopeq import load as f",
    "from mopeq.load import load; import mopeq; f = mopeq.load",
    "import mopeq; mopeq.load; from mopeq.load import load as f",
    "import mopeq.load as f",
)


def test_load_is_callable_whoever_was_imported_first() -> None:
    """One interpreter, mopeq forgotten in between: torch is what takes time."""
    code = f"""
import inspect, sys
for order in {ORDERS}:
    for name in [n for n in sys.modules if n.partition(".")[0] == "mopeq"]:
        del sys.modules[name]
    room = {{}}
    exec(order, room)
    import mopeq
    from mopeq.load import load_original
    f = room["f"]
    assert callable(f) and callable(mopeq.load) and mopeq.load.load_original is load_original, order
    assert list(inspect.signature(f).parameters) == ["path", "dtype", "device"], order
    try:
        f("/nowhere")
    except mopeq.MopeqError as error:
        print(error)
assert "transformers" not in sys.modules
"""
    message = "no folder /nowhere; expected a model's folder or its name on the Hugging Face hub"
    assert python(code).splitlines() == [message] * len(ORDERS)


def test_callable_module_takes_the_function_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that replaces the function replaces the call."""
    from types import ModuleType

    module = ModuleType("made_up")
    module.double = lambda x: 2 * x  # type: ignore[attr-defined]
    module.double.__name__ = "double"
    monkeypatch.setitem(sys.modules, "made_up", module)
    callable_module("made_up", module.double)
    assert module(4) == 8  # type: ignore[operator]
    monkeypatch.setattr(module, "double", lambda x: 3 * x)
    assert module(4) == 12  # type: ignore[operator]


LOADED = "type(AutoModelForCausalLM.from_pretrained(r'{}').model.layers[0].mlp.experts).__name__"


def test_others_are_left_alone(tiny_model: Callable[..., Path], packed: Path) -> None:
    """Loading an ordinary model, and looking up other quantizers, never imports ours; a packed one does.

    torch's own autoload is off, mopeq imported by hand, after transformers: test_autoload.py has the other ways.
    """
    code = f"""
import sys
from transformers import AutoModelForCausalLM
import mopeq
print({LOADED.format(tiny_model("olmoe"))})
from transformers.quantizers import auto
assert "gptq" in auto.AUTO_QUANTIZER_MAPPING and "nothing" not in auto.AUTO_QUANTIZER_MAPPING
assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__name__ == "GptqHfQuantizer"
try:
    auto.AUTO_QUANTIZER_MAPPING["nothing"]
except KeyError:
    pass
assert "mopeq.integrations.transformers" not in sys.modules
assert not any(getattr(f, "watched", None) == "transformers.quantizers.auto" for f in sys.meta_path)
print({LOADED.format(packed)})
assert auto.AUTO_QUANTIZER_MAPPING["mopeq"].__name__ == "MopeqHfQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["mopeq"].__name__ == "MopeqConfig"
"""
    said = python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert said.splitlines() == ["OlmoeExperts", "MopeqOlmoeExperts"]
