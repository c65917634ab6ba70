"""Packed checkpoints through transformers' own ``from_pretrained``, for every family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import packing
import tiny
from mopeq.adapters import describe
from mopeq.checkpoint import read_manifest, verify
from mopeq.errors import CheckpointError, InputError
from mopeq.kernels import selected, using
from mopeq.precision import Precision, PrecisionMap
from mopeq.runtime import MixedExperts, QLinear, packed_modules
from mopeq.source import open_source
from mopeq.spec import TOWERS

IDS = torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    family: str
    original: Path
    packed: Path
    model: Any
    dense: Any


def from_pretrained(folder: Path, family: str, **options: Any) -> Any:
    auto: Any = AutoModelForImageTextToText if family in tiny.VLM else AutoModelForCausalLM
    return auto.from_pretrained(folder, **options)


SINCE = {"aria": "5.19"}
"""The first transformers that has a family's experts fused; with an older one loading such a folder is refused."""


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Case:
    """A family packed with mixed precisions, loaded, beside the dense model with the same weights."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    original = tiny_model(family)
    if Version(transformers.__version__) < Version(SINCE.get(family, "5.0")):
        packing.pack_model(original, folder / "packed")
        with pytest.raises(CheckpointError, match=f"is no experts module of transformers {transformers.__version__}"):
            from_pretrained(folder / "packed", family)
        pytest.skip(f"{family} needs transformers {SINCE[family]}, this is {transformers.__version__}")
    packing.pack_model(original, folder / "packed", max_shard_bytes=200_000)
    packing.dequantized(original, folder / "packed", folder / "dense")
    return Case(
        family,
        original,
        folder / "packed",
        from_pretrained(folder / "packed", family, dtype=torch.float32),
        from_pretrained(folder / "dense", family, dtype=torch.float32),
    )


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@torch.no_grad()
def test_logits_equal_the_dequantized_model(case: Case) -> None:
    want = case.dense(IDS).logits
    assert error(case.model(IDS).logits, want) < 1e-5
    original = from_pretrained(case.original, case.family, dtype=torch.float32)(IDS).logits
    assert error(want, original) > 0.05  # so that the line above says something


@torch.no_grad()
def test_generation_with_cache_and_left_padding(case: Case) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD, "eos_token_id": None}
    got = case.model.generate(IDS.masked_fill(mask == 0, tiny.PAD), attention_mask=mask, **settings)
    want = case.dense.generate(IDS.masked_fill(mask == 0, tiny.PAD), attention_mask=mask, **settings)
    assert got.tolist() == want.tolist()
    alone = case.model.generate(IDS[:1, 4:], attention_mask=mask[:1, 4:], use_cache=False, **settings)
    assert alone[0, 7:].tolist() == got[0, 11:].tolist()


def test_everything_that_should_be_packed_is(case: Case) -> None:
    manifest = read_manifest(case.packed)
    modules = packed_modules(case.model)
    experts = [m for m in modules.values() if isinstance(m, MixedExperts)]
    assert [m.mopeq_layer for m in experts] == list(manifest.inventory.layers)
    assert {n for n, m in modules.items() if isinstance(m, QLinear)} == {
        n for n, linear in manifest.linears.items() if linear.precision != Precision(16)
    }
    for m in experts:
        assert not {"gate_up_proj", "down_proj"} & set(m._parameters)
        assert m.mopeq_layouts["down"].precisions == manifest.precisions.experts["down"][m.mopeq_layer]
    panels = {m.mopeq_form for m in modules.values()}
    assert panels == ({"panels"} if selected().name == "cpu" else {"plain"})
    assert case.model.is_quantized
    assert str(case.model.config.quantization_config.quant_method) == "mopeq"


@torch.no_grad()
def test_every_kernel_gives_the_same_model(case: Case) -> None:
    with using("naive"):
        plain = from_pretrained(case.packed, case.family, dtype=torch.float32)
        want = plain(IDS).logits
        assert {m.mopeq_form for m in packed_modules(plain).values()} == {"plain"}
    assert error(case.model(IDS).logits, want) < 1e-5


def test_save_pretrained_writes_what_was_read(case: Case, tmp_path: Path) -> None:
    case.model.save_pretrained(tmp_path / "again", max_shard_size="150KB")
    first, second = tiny.tensors(case.packed), tiny.tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    full = {name for name in first if first[name].dtype != second[name].dtype}
    assert all(first[name].equal(second[name]) for name in first if name not in full)
    assert all(first[name].float().equal(second[name]) for name in full)
    towers = {ref.key for ref in describe(open_source(case.original)).kept if ref.group in TOWERS}
    assert full <= {*read_manifest(case.packed).full_tensors(), *towers}  # what has 16 bits was loaded in float32
    assert verify(tmp_path / "again", hashes=False) == read_manifest(case.packed)
    again = from_pretrained(tmp_path / "again", case.family, dtype=torch.float32)
    with torch.no_grad():
        assert error(again(IDS).logits, case.model(IDS).logits) < 1e-5  # alignment in memory may change the last bits


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_memory_is_the_file(family: str, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """In the checkpoint's own types, parameters and buffers take exactly the bytes of the tensors on disk."""
    packing.pack_model(tiny_model(family, dtype=torch.bfloat16), tmp_path / "packed")
    model = from_pretrained(tmp_path / "packed", family)
    stored = sum(t.numel() * t.element_size() for t in tiny.tensors(tmp_path / "packed").values())
    computed = {id(b) for _, b in model.named_non_persistent_buffers()}  # rotary tables, in no file
    held = {id(t): t for t in [*model.parameters(), *model.buffers()] if id(t) not in computed}
    assert sum(t.numel() * t.element_size() for t in held.values()) == stored
    assert sum(t.untyped_storage().nbytes() for t in held.values()) == stored
    manifest = read_manifest(tmp_path / "packed")
    inventory = manifest.inventory
    assert stored == inventory.expert_bytes(manifest.precisions) + inventory.rest_bytes(manifest.precisions.rest) + (
        inventory.kept_bytes
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_files_are_let_go(family: str, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """No tensor keeps a whole mapped file in memory."""
    packing.pack_model(tiny_model(family), tmp_path / "packed")
    model = from_pretrained(tmp_path / "packed", family)
    assert str(tmp_path / "packed") not in Path("/proc/self/maps").read_text()
    assert model.config.model_type == family


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_dtype(family: str, dtype: torch.dtype, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """Renamed parameters too (Mixtral's router) take the type that is asked for; what is packed keeps its own."""
    packing.pack_model(tiny_model(family), tmp_path / "packed")
    model = from_pretrained(tmp_path / "packed", family, dtype=dtype)
    dense = from_pretrained(tiny_model(family), family, dtype=dtype)
    kinds = {n: p.dtype for n, p in dense.named_parameters()}
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: kinds[n] for n, _ in model.named_parameters()}
    for module in packed_modules(model).values():
        assert {b.dtype for _, b in module.named_buffers()} <= {torch.uint8, torch.float16}
    logits = model(IDS).logits
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()


def test_original_layouts_on_disk_make_no_difference(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """Packed from transformers' fused names or from the hub's: the same files but for names of other tensors."""
    packing.pack_model(tiny_model("mixtral"), tmp_path / "hub")
    packing.pack_model(tiny_model("mixtral", hub_layout=False), tmp_path / "fused")
    with torch.no_grad():
        logits = [
            from_pretrained(tmp_path / kind, "mixtral", dtype=torch.float32)(IDS).logits for kind in ("hub", "fused")
        ]
    assert torch.equal(*logits)


@torch.no_grad()
def test_base_model_without_head(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    packing.pack_model(tiny_model("olmoe"), tmp_path / "packed")
    whole = from_pretrained(tmp_path / "packed", "olmoe", dtype=torch.float32)
    base = AutoModel.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


@pytest.mark.parametrize("precision", [Precision(3, 32, True), Precision(16)], ids=str)
@torch.no_grad()
def test_uniform_maps_without_zeros_or_scales(
    precision: Precision, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    """Buffers that no expert needs do not exist, and that is not taken for a missing tensor."""
    original = tiny_model("olmoe")
    layers = {0: 8, 1: 8}
    packing.pack_model(original, tmp_path / "packed", PrecisionMap.uniform(layers, precision, rest={}))
    model = from_pretrained(tmp_path / "packed", "olmoe", dtype=torch.float32)
    dense = from_pretrained(packing.dequantized(original, tmp_path / "packed", tmp_path / "dense"), "olmoe")
    assert error(model(IDS).logits, dense(IDS).logits) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert tiny.tensors(tmp_path / "again").keys() == tiny.tensors(tmp_path / "packed").keys()


@torch.no_grad()
def test_parts_of_a_joined_matrix_at_16_bits(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """MolmoE's files have q, k and v in one; a packed checkpoint has them apart, and again when it is saved anew."""
    original = tiny_model("molmo")
    packing.pack_model(original, tmp_path / "packed", PrecisionMap.uniform({0: 8, 1: 8}, Precision(4, 32), rest={}))
    model = from_pretrained(tmp_path / "packed", "molmo", dtype=torch.float32)
    dense = from_pretrained(packing.dequantized(original, tmp_path / "packed", tmp_path / "dense"), "molmo")
    assert error(model(IDS).logits, dense(IDS).logits) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert tiny.tensors(tmp_path / "again").keys() == tiny.tensors(tmp_path / "packed").keys()
    again = from_pretrained(tmp_path / "again", "molmo", dtype=torch.float32)
    assert error(again(IDS).logits, model(IDS).logits) < 1e-5


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def olmoe(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    packing.pack_model(tiny_model("olmoe"), tmp_path / "packed")
    return tmp_path / "packed"


NAME = "model.layers.1.mlp.experts.3.up_proj"


def scales_of(folder: Path) -> tuple[str, Tensor]:
    return next((k, t) for k, t in tiny.tensors(folder).items() if ".experts.5." in k and k.endswith(".scales"))


def test_missing_packed_tensor(olmoe: Path) -> None:
    tiny.rewrite(olmoe, {f"{NAME}.qweight": None})
    with pytest.raises(CheckpointError, match=rf"1 packed tensors are missing, the first is {NAME}\.qweight"):
        AutoModelForCausalLM.from_pretrained(olmoe)


def test_wrong_type(olmoe: Path) -> None:
    name, scales = scales_of(olmoe)
    tiny.rewrite(olmoe, {name: scales.float()})
    with pytest.raises(CheckpointError, match=rf"{name} is F32 .*makes it F16"):
        AutoModelForCausalLM.from_pretrained(olmoe)


def test_wrong_shape(olmoe: Path) -> None:
    name, scales = scales_of(olmoe)
    tiny.rewrite(olmoe, {name: scales[:-8].clone()})
    with pytest.raises(CheckpointError, match=rf"{name} is F16 "):
        AutoModelForCausalLM.from_pretrained(olmoe)


def test_cut_off_shard(olmoe: Path) -> None:
    (shard,) = olmoe.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="its header describes"):
        AutoModelForCausalLM.from_pretrained(olmoe)


def test_newer_format(olmoe: Path) -> None:
    config = json.loads((olmoe / "config.json").read_text())
    config["quantization_config"]["format_version"] = 4
    (olmoe / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format_version 4; this mopeq reads 1, 2, 3"):
        AutoModelForCausalLM.from_pretrained(olmoe)


def test_another_model_under_the_same_name(olmoe: Path, tiny_model: Callable[..., Path]) -> None:
    """config.json of one model, packed tensors of another: shapes of modules decide."""
    config = json.loads((olmoe / "config.json").read_text())
    tiny.edit_config(olmoe, intermediate_size=64)
    with pytest.raises(
        CheckpointError, match=r"layer 0: OlmoeExperts\.gate_up_proj is \(8, 128, 64\), the checkpoint has"
    ):
        AutoModelForCausalLM.from_pretrained(olmoe)
    tiny.edit_config(olmoe, intermediate_size=128, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"OlmoeForCausalLM has no module model\.layers\.1\.mlp\.experts"):
        AutoModelForCausalLM.from_pretrained(olmoe)
    tiny.edit_config(olmoe, num_hidden_layers=2, num_key_value_heads=2)
    with pytest.raises(CheckpointError, match=r"k_proj is Linear \[32, 64\]; the checkpoint has a Linear \[64, 64\]"):
        AutoModelForCausalLM.from_pretrained(olmoe)
    tiny.edit_config(olmoe, num_key_value_heads=4, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is tied"):
        AutoModelForCausalLM.from_pretrained(olmoe)
    tiny.edit_config(olmoe, tie_word_embeddings=config["tie_word_embeddings"])
    AutoModelForCausalLM.from_pretrained(olmoe)


def test_an_unfilled_buffer_is_an_error(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers finds no tensor it leaves uninitialised memory; this check does not rely on the files'."""
    from mopeq.integrations import transformers as ours

    monkeypatch.setattr(ours, "check_packed", lambda manifest, headers: None)
    name = "model.layers.0.self_attn.q_proj"
    saved = tiny.tensors(olmoe)
    tiny.rewrite(olmoe, {f"{name}.scales": None})
    with pytest.raises(CheckpointError, match=rf"{name}\.scales was not loaded: its tensors are missing"):
        AutoModelForCausalLM.from_pretrained(olmoe)
    tiny.rewrite(olmoe, {f"{name}.scales": saved[f"{name}.scales"], f"{NAME}.qweight": None})
    with pytest.raises(CheckpointError, match=r"gate_up_qweight: 7 tensors; expected one for each of 8 experts"):
        AutoModelForCausalLM.from_pretrained(olmoe)
    tiny.rewrite(olmoe, {f"{NAME}.qweight": saved[f"{NAME}.qweight"][:, :8].clone()})
    with pytest.raises(CheckpointError, match=r"gate_up_qweight: expert 3 has torch\.uint8 \[128, 8\]; expected"):
        AutoModelForCausalLM.from_pretrained(olmoe)


def test_disk_offload_is_refused(olmoe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device_map puts packed modules on disk"):
        AutoModelForCausalLM.from_pretrained(olmoe, device_map={"": "disk"}, offload_folder=tmp_path / "offload")


def test_device_map(olmoe: Path) -> None:
    mapped = AutoModelForCausalLM.from_pretrained(olmoe, device_map="cpu", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(olmoe, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(mapped(IDS).logits, plain(IDS).logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@torch.no_grad()
def test_cuda(case: Case) -> None:
    model = from_pretrained(case.packed, case.family, dtype=torch.float32, device_map="cuda")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
    assert error(model(IDS.cuda()).logits.cpu(), case.dense(IDS).logits) < 1e-3
    assert torch.equal(model(IDS.cuda()).logits, model(IDS.cuda()).logits)


def test_copying_the_folder_is_enough(olmoe: Path, tmp_path: Path) -> None:
    """Nothing in the files points elsewhere, and the record in mopeq/ is not needed."""
    moved = Path(shutil.copytree(olmoe, tmp_path / "moved"))
    shutil.rmtree(olmoe)
    shutil.rmtree(moved / "mopeq")
    assert AutoModelForCausalLM.from_pretrained(moved).config.model_type == "olmoe"
    assert transformers.AutoTokenizer.from_pretrained(moved)("ab")["input_ids"]
