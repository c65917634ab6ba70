"""The model without transformers against transformers' own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import packing
import tiny
from mopeq.adapters import describe, inventory_of
from mopeq.checkpoint import verify
from mopeq.errors import CheckpointError, ModelError
from mopeq.kernels import selected, using
from mopeq.kernels.fill import Stored
from mopeq.load import load, load_tokenizer
from mopeq.precision import LEFT_OUT, PrecisionMap
from mopeq.runtime.decode import Sampling, decode
from mopeq.runtime.generate import generate
from mopeq.runtime.lean_load import FAMILIES, PANELS, _filled, lay_out, lean_of
from mopeq.runtime.step import Step
from mopeq.source import open_source

pytestmark = pytest.mark.skipif(selected().name != "cpu", reason="no compiled kernel")
Make = Callable[..., Path]
PROMPT = torch.randint(0, 250, (1, 9), generator=torch.Generator().manual_seed(0))
WAYS = (Sampling(), Sampling(1.2, top_p=0.9, top_k=50))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Make) -> Path:
    """With experts of all widths, kinds and groups, at 16 bits too."""
    out = tmp_path_factory.mktemp("packed") / request.param
    packing.pack_model(tiny_model(request.param), out)
    return out


@pytest.fixture
def olmoe(tmp_path: Path, tiny_model: Make) -> Path:
    packing.pack_model(tiny_model("olmoe"), tmp_path / "olmoe")
    return tmp_path / "olmoe"


def change(folder: Path, **settings: Any) -> Path:
    """The folder, with settings changed; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | settings
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:, :1]], ids=["nine", "one"])
@torch.no_grad()
def test_bits_of_transformers(folder: Path, dtype: torch.dtype, prompt: Tensor) -> None:
    """Logits of the whole prompt and of every token, greedy and sampled."""
    lean, whole = lean_of(folder, dtype), load(folder, dtype)
    assert lean is not None
    for how in WAYS:
        made = []
        for model in (lean, whole):
            torch.manual_seed(1)
            logits = list[Tensor]()
            tokens = list(decode(model, prompt, 12, frozenset([tiny.EOS]), how, heard=logits.append))
            made.append((tokens, torch.cat(logits)))
        assert made[0][0] == made[1][0]
        assert made[0][1].equal(made[1][1])


def test_steps_are_native(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    real = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, token, at: steps.append(at) or real(self, token, at))
    with torch.no_grad():
        assert len(list(decode(lean_of(olmoe), PROMPT, 4, frozenset(), Sampling()))) == 4
    assert steps == [9, 10, 11]


def test_generates_what_transformers_does(olmoe: Path) -> None:
    tokenizer = load_tokenizer(olmoe)
    for prompt in ("Hello", [{"role": "user", "content": "Hello"}], PROMPT[0]):
        made, want = (generate(m, tokenizer, prompt, max_new_tokens=7) for m in (lean_of(olmoe), load(olmoe)))
        assert (made.text, made.tokens, made.prompt_tokens) == (want.text, want.tokens, want.prompt_tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_qkv": 8.0},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": ...},
        {"norm_topk_prob": ...},
        {"model_type": "qwen2_moe"},
        {"dtype": "float64"},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
    ids=lambda s: " ".join(map(str, s)),
)
def test_settings_for_transformers(olmoe: Path, settings: dict[str, Any]) -> None:
    assert lean_of(olmoe) is not None
    assert lean_of(change(olmoe, **settings)) is None


def test_folders_for_transformers(olmoe: Path, tmp_path: Path, tiny_model: Make) -> None:
    assert lean_of("allenai/OLMoE-1B-7B-0924") is None
    assert lean_of(tiny_model("olmoe")) is None
    with using("naive"):
        assert lean_of(olmoe) is None
    source = open_source(tiny_model("olmoe"))
    model = inventory_of(source, describe(source))
    rows = packing.mixed_map(model).experts
    gone = {g: {k: (LEFT_OUT, *row[1:]) for k, row in layers.items()} for g, layers in rows.items()}
    packing.pack_model(tiny_model("olmoe"), tmp_path / "gone", PrecisionMap(gone, packing.REST))
    assert lean_of(tmp_path / "gone") is None
    (olmoe / "generation_config.json").write_text("{}")
    assert lean_of(olmoe) is None


def test_damage(olmoe: Path, tmp_path: Path) -> None:
    weights = next(olmoe.glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        lean_of(olmoe)
    weights.write_bytes(whole.replace(b".up_proj.scales", b".up_proj.scalex", 1))
    with pytest.raises(CheckpointError, match=r"lacks tensor .*up_proj\.scales"):
        lean_of(olmoe)
    with pytest.raises(CheckpointError, match="gone cannot be read: No such file"):
        _filled([Stored(tmp_path / "gone", 0, 1, 1)], 1, {})


def test_laid_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same bits from a mapped file, whose bytes nothing reads before they are used; only for the same files."""
    before = sorted(file.name for file in (folder / "mopeq").iterdir())
    made, size = [], lay_out(folder)
    assert size == (folder / PANELS).stat().st_size
    try:
        for mapped in (False, True):
            lean = lean_of(folder, mapped=mapped)
            assert lean is not None
            assert bool(lean.tensors) is not mapped
            logits = list[Tensor]()
            with torch.no_grad():
                tokens = list(decode(lean, PROMPT, 8, frozenset(), Sampling(), heard=logits.append))
            made.append((tokens, torch.cat(logits)))
        assert made[0][0] == made[1][0]
        assert made[0][1].equal(made[1][1])
        verify(folder)
        other = lean_of(folder, torch.float16)
        assert other is not None
        assert other.tensors
        assert "panels.safetensors is of other files, or of another type than torch.float16" in caplog.text
        (folder / PANELS).write_bytes((folder / PANELS).read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="is damaged"):
            lean_of(folder)
    finally:
        (folder / PANELS).unlink()
    assert before == sorted(file.name for file in (folder / "mopeq").iterdir())


def test_what_cannot_be_laid_out(olmoe: Path, tiny_model: Make) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; expected a folder of mopeq quantize"):
        lay_out(olmoe / "absent")
    with pytest.raises(ModelError, match="cannot be laid out"):
        lay_out(tiny_model("olmoe"))
    (olmoe / "mopeq" / "hashes.json").unlink()
    with pytest.raises(ModelError, match=r"cannot be laid out; expected a folder of mopeq quantize with all its files"):
        lay_out(olmoe)


def test_stale(olmoe: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder whose files are others now, such as after mopeq align."""
    lay_out(olmoe)
    hashes = olmoe / "mopeq" / "hashes.json"
    hashes.write_text(hashes.read_text().replace("sha256", "sha257", 1))
    assert lean_of(olmoe).tensors  # type: ignore[union-attr]
    assert "of other files" in caplog.text


RUN = """
import sys
from mopeq.cli import main
code = main(["run", sys.argv[1], "--prompt", "Hello", "--max-new-tokens", "5", "--json"])
heavy = ("transformers.modeling_utils", "transformers.generation.utils", "torch._dynamo", "sympy", "scipy")
print(code, [name for name in heavy if name in sys.modules])
"""


def test_what_run_imports(olmoe: Path) -> None:
    """Not transformers' modelling, nor what that and Dynamo import: 2 of the 3 seconds that a first token may take."""
    done = subprocess.run([sys.executable, "-c", RUN, str(olmoe)], capture_output=True, text=True, timeout=300,
                          check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, _, counted = done.stdout.strip().rpartition("\n")
    assert counted == "0 []"
    want = generate(load(olmoe), load_tokenizer(olmoe), "Hello", max_new_tokens=5)
    assert json.loads(said)["text"] == want.text
