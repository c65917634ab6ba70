"""``import torch`` is enough for transformers to know packed checkpoints, whoever comes first; torch never breaks.

Orders of import are tried with a made-up transformers, which takes no time; the last tests use the real one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import packing

MADE_UP = {
    "transformers/__init__.py": "",
    "transformers/quantizers/__init__.py": "from .auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING",
    "transformers/quantizers/auto.py": """
import torch  # as the real one, which may be the first to do so
AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING = {"gptq": 1}, {"gptq": 2}
""",
    "transformers/models/__init__.py": "",
    "transformers/models/auto/__init__.py": "",
    "transformers/models/auto/configuration_auto.py": """
class Lazy:  # as the real one: what others register lies apart
    def __init__(self, names): self._mapping, self._extra_content = names, {}
    def __contains__(self, key): return key in self._mapping or key in self._extra_content
    def __getitem__(self, key): return self._extra_content[key] if key in self._extra_content else self._mapping[key]
CONFIG_MAPPING = Lazy({"olmoe": 5})
""",
    "transformers/models/auto/processing_auto.py": """
from .configuration_auto import Lazy
import torch  # the last import before the mapping is made
class Processor: pass
PROCESSOR_MAPPING = Lazy({})
""",
    "transformers/model.py": "from transformers.models.auto import configuration_auto, processing_auto",
    "torch.py": "import mopeq.autoload; mopeq.autoload.install()",
    "mopeq_stub.py": """
import sys, types, mopeq.autoload
def register(name):
    if name == "mopeq.models.register":
        from transformers.models.auto import configuration_auto
        configuration_auto.CONFIG_MAPPING._extra_content["deepseek_vl_v2"] = 7
        return sys.modules[__name__]
    if name == "mopeq.models.processors":
        from transformers.models.auto import processing_auto
        processing_auto.PROCESSOR_MAPPING._extra_content[processing_auto.Processor] = 8
        return sys.modules[__name__]
    from transformers.quantizers import auto
    for number, mapping in enumerate((auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING)):
        assert name == "mopeq.integrations.transformers"
        mapping["mopeq"] = number
    return sys.modules[__name__]
mopeq.autoload.importlib = types.SimpleNamespace(import_module=register)
def ours():
    return [f for f in sys.meta_path if "mopeq" in type(f).__module__]
""",
}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made_up")
    for name, text in MADE_UP.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def python(code: str, *, path: Path | None = None, cwd: Path | None = None, **environment: str) -> str:
    """Run code in a fresh interpreter, ``path`` before everything else; what it printed."""
    env = {**os.environ, **environment}
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [env.get("PYTHONPATH")])])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False,
                            env=env, cwd=cwd)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


ORDERS = (
    "import torch; import transformers.quantizers.auto",
    "import transformers.quantizers.auto",  # torch, and with it the hook, comes while this is half executed
    "import transformers, torch",
    "import transformers.quantizers, mopeq",
    "import mopeq, torch, transformers.quantizers",
    "import torch, importlib.util as u; u.find_spec('transformers.quantizers.auto'); import transformers.quantizers",
    "import torch, importlib, mopeq.autoload as a; a.install(); importlib.reload(a); a.install()",
    "import torch, threading as t; s = [t.Thread(target=__import__, args=('transformers.quantizers',)) for _ in "
    "range(8)]; [x.start() for x in s]; [x.join() for x in s]",
)


@pytest.mark.parametrize("order", ORDERS)
def test_any_order(order: str, made_up: Path) -> None:
    code = f"""
{order}
import mopeq_stub
import transformers.model, transformers  # a model's module is imported after the quantizers'
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
import transformers.quantizers as q
from transformers.quantizers import auto
assert not mopeq_stub.ours(), "the hook has done its work and is gone"
for number, name in enumerate(("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING")):
    mapping = getattr(auto, name)
    assert mapping is getattr(q, name)
    assert list(mapping) == ["gptq"] and mapping["gptq"] == mapping.get("gptq") == number + 1
    assert "none" not in mapping and mapping.get("none", 3) == 3
for number, mapping in enumerate((auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING)):
    assert "mopeq" in mapping and mapping["mopeq"] == mapping.get("mopeq") == number
assert "none" not in CONFIG_MAPPING and "olmoe" in CONFIG_MAPPING and not CONFIG_MAPPING._extra_content
assert "deepseek_vl_v2" in CONFIG_MAPPING and CONFIG_MAPPING["deepseek_vl_v2"] == 7
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, Processor
assert Processor in PROCESSOR_MAPPING and [*PROCESSOR_MAPPING._extra_content.values()] == [8]
print("good")
"""
    assert python(code, path=made_up) == "good"


def test_first_of_all_asked_for_a_processor(made_up: Path) -> None:
    """Nothing is imported between the mapping's making and its first use."""
    code = """
import sys, transformers.models.auto.processing_auto as p
sys.path_hooks.clear(); sys.path.clear()
print(type(p.PROCESSOR_MAPPING._extra_content).__name__)
"""
    assert python(code, path=made_up) == "_Processors"


def test_switched_off(made_up: Path) -> None:
    code = "import torch, mopeq, transformers.quantizers as q; print(type(q.AUTO_QUANTIZER_MAPPING).__name__)"
    assert python(code, path=made_up, MOPEQ_AUTOLOAD="0") == "dict"
    assert python(code, path=made_up, MOPEQ_AUTOLOAD="1") == "_Mapping"


def test_without_transformers(made_up: Path) -> None:
    """The hook waits for ever and says nothing; searching for the module finds nothing, as without it."""
    code = """
import sys, mopeq.autoload as a, importlib.util
sys.modules.pop("transformers", None)
sys.path[:] = [p for p in sys.path if "site-packages" not in p]
a.install(); a.install()
try:
    import transformers
except ModuleNotFoundError as error:
    print(error)
assert len([f for f in sys.meta_path if type(f).__module__ == "mopeq.autoload"]) == 3
import colorsys  # others are found as ever
"""
    assert python(code) == "No module named 'transformers'"


def test_never_raises(made_up: Path, tmp_path: Path) -> None:
    """A transformers that is built otherwise, or one that cannot be imported, meets no exception of ours."""
    (tmp_path / "transformers/quantizers").mkdir(parents=True)
    (tmp_path / "transformers/__init__.py").touch()
    (tmp_path / "transformers/quantizers/__init__.py").touch()
    auto = tmp_path / "transformers/quantizers/auto.py"
    auto.write_text("SOMETHING_ELSE = {}")
    code = """
import logging, sys, mopeq.autoload as a
logging.basicConfig(stream=sys.stdout, format="%(message)s")
a.install()
try:
    import transformers.quantizers.auto
except ZeroDivisionError:
    print("theirs")
"""
    said = python(code, path=tmp_path)
    assert "load them with mopeq.load" in said
    assert len(said.splitlines()) == 1
    auto.write_text("1 / 0")
    assert python(code, path=tmp_path) == "theirs"
    auto.write_text("AUTO_QUANTIZATION_CONFIG_MAPPING = AUTO_QUANTIZER_MAPPING = None")
    assert "load them with mopeq.load" in python(code, path=tmp_path)


# --- the real ones ----------------------------------------------------------------------------------------------------


def test_entry_point_is_installed() -> None:
    found = [e.value for e in entry_points(group="torch.backends") if e.name == "mopeq"]
    assert found == ["mopeq.autoload:install"], (
        f"the installed package says torch.backends = {found}: it was installed from an older pyproject.toml; "
        "run pip install -e . again"
    )


def test_torch_leaves_a_hook_and_nothing_else() -> None:
    code = """
import sys, torch
print([type(f).__name__ for f in sys.meta_path if "mopeq" in type(f).__module__],
      sorted(m for m in sys.modules if m.startswith(("mopeq", "transformers"))))
"""
    assert python(code) == "['_Finder', '_Finder', '_Finder'] ['mopeq', 'mopeq.autoload']"


def test_from_pretrained_without_an_import(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """In the order that is hardest, in threads, and in a folder whose ``mopeq`` is no package."""
    packing.pack_model(tiny_model("olmoe"), tmp_path / "packed")
    code = """
import transformers.quantizers.auto, sys
from concurrent.futures import ThreadPoolExecutor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
assert "mopeq.integrations.transformers" not in sys.modules
with ThreadPoolExecutor(4) as pool:
    models = list(pool.map(AutoModelForCausalLM.from_pretrained, ["."] * 4))
print({type(m.model.layers[0].mlp.experts).__name__ for m in models})
"""
    assert python(code, cwd=tmp_path / "packed") == "{'MopeqOlmoeExperts'}"


def test_switched_off_mopeq_still_loads(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    packing.pack_model(tiny_model("olmoe"), tmp_path / "packed")
    code = "import mopeq; print(type(mopeq.load('packed').model.layers[0].mlp.experts).__name__)"
    assert python(code, cwd=tmp_path, MOPEQ_AUTOLOAD="0") == "MopeqOlmoeExperts"
