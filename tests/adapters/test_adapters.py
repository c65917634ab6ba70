"""Every family against the model that transformers builds from the same folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mopeq import seam
from mopeq.adapters import SUPPORTED, coverage, describe, groups_table, inventory_of, spec_from
from mopeq.errors import ModelError
from mopeq.layers import image_experts
from mopeq.precision import GROUPS, parse_precision
from mopeq.qtensor import packed_shapes
from mopeq.source import Source, open_source, read_group, read_matrix
from mopeq.spec import MoESpec, fitting
from tiny import FAMILIES, VLM, edit_config, rewrite, tensors, tiny_config

Saver = Callable[..., Path]
FUSED_ON_HUB = {"aria", "glm46v", "granitemoe", "gpt_oss", "qwen3_vl_moe", "llama4", "llama4_text"}
families = pytest.mark.parametrize("family", sorted(FAMILIES))
layouts = pytest.mark.parametrize("hub_layout", [True, False], ids=["hub", "fused"])
QWEN3_30B = {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
MOE_LAYERS = {"qwen2_moe": [0, 2], "deepseek_v2": [1, 2], "deepseek_v3": [1, 2], "glm4_moe": [1, 2], "llama4": [0, 2],
              "llama4_text": [0, 2], "ernie4_5_moe": [1, 2], "deepseek_vl_v2": [1, 2],
              "glm4v_moe": [1, 2], "glm46v": [1, 2], "kimi_k25": [1, 2], "deepseek_ocr2": [1, 2],
              "ernie4_5_vl_moe": [1, image_experts(1), 2, image_experts(2)]}  # fmt: skip


@cache
def loaded(path: Path) -> Any:
    auto = (
        AutoModelForImageTextToText if path.name.startswith(VLM) and "text" not in path.name else AutoModelForCausalLM
    )
    model, info = auto.from_pretrained(path, experts_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def described(path: Path) -> tuple[Source, MoESpec]:
    source = open_source(path)
    return source, describe(source)


def test_every_tiny_family_is_supported() -> None:
    assert set(SUPPORTED) == set(FAMILIES)
    assert list(SUPPORTED) == sorted(SUPPORTED)


@families
@layouts
def test_every_tensor_is_accounted_for_once(tiny_model: Saver, family: str, hub_layout: bool) -> None:
    source, spec = described(tiny_model(family, hub_layout=hub_layout))
    fused = [ref.key for e in spec.experts() for ref in (e.gate, e.up, e.down)]
    others = [r.key for r in spec.linears] + [r.key for r in spec.kept] + list(spec.ignored)
    assert sorted({*fused, *others}) == sorted(source.shapes)
    joined = [r.key for r in spec.linears if r.rows is not None]
    assert len(set(fused)) + len(others) - len(joined) + len(set(joined)) == len(source.shapes)
    stored = sum(prod(shape) for shape in source.shapes.values())
    assert inventory_of(source, spec).parameters == stored
    assert sum(row.parameters for row in groups_table(spec, source)) == stored
    assert sum(row.nbytes for row in groups_table(spec, source)) == 4 * stored


@families
@layouts
def test_names_are_modules_of_the_transformers_model(tiny_model: Saver, family: str, hub_layout: bool) -> None:
    path = tiny_model(family, hub_layout=hub_layout)
    source, spec = described(path)
    model = loaded(path)
    assert [layer.index for layer in spec.layers] == MOE_LAYERS.get(family, [0, 1])
    experts = {name for name, module in model.named_modules() if seam.is_experts(module)}
    assert {layer.module for layer in spec.layers} == experts
    for layer in spec.layers:
        module, router = model.get_submodule(layer.module), model.get_submodule(layer.router)
        assert module.gate_up_proj.shape[0] == len(layer.experts)
        assert router.weight.shape == (len(layer.experts), layer.hidden_size)
        assert router.top_k == layer.top_k
    for ref in spec.linears:
        linear = model.get_submodule(ref.module)
        assert type(linear) is nn.Linear
        assert tuple(linear.weight.shape) == ref.shape
        assert torch.equal(linear.weight, read_matrix(source, ref.weight))


@families
def test_no_linear_of_the_language_model_is_skipped(tiny_model: Saver, family: str) -> None:
    path = tiny_model(family)
    _, spec = described(path)
    expected = {
        name
        for name, module in loaded(path).named_modules()
        if type(module) is nn.Linear and not re.search(r"visual|vision|projector|resampler|shared_expert_gate", name)
    }
    assert {ref.module for ref in spec.linears} == expected
    groups = {ref.group for ref in spec.linears}
    assert groups <= {"attention", "dense_mlp", "shared_experts", "lm_head"}
    assert ("dense_mlp" in groups) == (family in MOE_LAYERS)
    assert ("shared_experts" in groups) == (family in {*MOE_LAYERS, "aria", "qwen3_5_moe"})


def textbook(module: Any, gate_up: Tensor, down: Tensor, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum over the chosen experts, one token at a time."""
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for e, c in zip(index[t].tolist(), weights[t], strict=True):
            token = (x[t] * c if seam.weighs_input(module) else x[t])[None]
            y = seam.activate(module, token @ gate_up[e].T, e) @ down[e].T
            bias = seam.down_bias(module, e)
            y = y if bias is None else y + bias
            out[t] += y[0] if seam.weighs_input(module) else c * y[0]
    return out


@torch.no_grad()
def own(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The module's own forward."""
    if not seam.weighs_input(module):
        return module(x, index, weights)
    experts = module.gate_up_proj.shape[0]  # Llama 4: every expert sees all tokens, scaled by their dense scores
    scores = torch.zeros(x.shape[0], experts).scatter_(1, index, weights)
    rows = (x.repeat(experts, 1) * scores.T.reshape(-1, 1)).contiguous()
    return module(rows).reshape(experts, *x.shape).sum(0)


@families
@layouts
@torch.no_grad()
def test_matrices_reproduce_the_modules_computation(tiny_model: Saver, family: str, hub_layout: bool) -> None:
    path = tiny_model(family, hub_layout=hub_layout)
    source, spec = described(path)
    draw = torch.Generator().manual_seed(1)
    for layer in spec.layers:
        module = loaded(path).get_submodule(layer.module)
        x = torch.randn(9, layer.hidden_size, generator=draw)
        k = max(layer.top_k, 2)
        index = torch.stack([torch.randperm(len(layer.experts), generator=draw)[:k] for _ in range(9)])
        weights = torch.rand(9, k, generator=draw)
        gate_up, down = (read_group(source, layer, group) for group in GROUPS)
        assert gate_up.shape == (len(layer.experts), 2 * layer.intermediate_size, layer.hidden_size)
        assert down.shape == (len(layer.experts), layer.hidden_size, layer.intermediate_size)
        want = own(module, x, index, weights)
        got = textbook(module, gate_up, down, x, index, weights)
        assert want.abs().max() > 0.1
        assert (got - want).norm() / want.norm() < 1e-5


@families
def test_names_of_packed_tensors_are_the_hubs(tiny_model: Saver, family: str) -> None:
    _, hub = described(tiny_model(family))
    _, fused = described(tiny_model(family, hub_layout=False))
    names = [name for e in hub.experts() for name in e.names.values()]
    other = [name for e in fused.experts() for name in e.names.values()]
    assert [module_name(family, name) for name in names] == other
    assert len(set(names)) == 3 * sum(len(layer.experts) for layer in hub.layers)
    for layer in hub.layers:
        for e, expert in enumerate(layer.experts):
            if family not in {*FUSED_ON_HUB, "ernie4_5_vl_moe"}:  # whose files number both kinds' experts through
                stored = {"gate": expert.gate.key, "up": expert.up.key, "down": expert.down.key}
                assert {m: f"{name}.weight" for m, name in expert.names.items()} == stored
            else:
                assert module_name(family, expert.names["gate"]) == f"{layer.module}.{e}.gate_proj"
                assert module_name(family, expert.names["down"]) == f"{layer.module}.{e}.down_proj"


def module_name(family: str, name: str) -> str:
    """What a name in files is in models whose modules go by other names; saved fused, their files have those."""
    nested, flat = family in ("aria", "internvl", "kimi_k25"), ("deepseek_ocr2", "ernie4_5_vl_moe")
    name = re.sub(r"\Amodel\.layers\.", "model.language_model.layers.", name) if family in flat else name
    name = re.sub(r"\Alanguage_model\.model\.", "model.language_model.", name) if nested else name
    return name.replace(".blocks.", ".layers.")


@families
def test_bfloat16_shards(tiny_model: Saver, family: str) -> None:
    source, spec = described(tiny_model(family, dtype=torch.bfloat16, max_shard_size="300KB"))
    one = describe(open_source(tiny_model(family)))
    assert spec == one
    assert len(set(source.files.values())) > 1 or family == "qwen3_vl_moe"  # rewritten by save_tiny
    assert inventory_of(source, spec).fingerprint == inventory_of(source, one).fingerprint


@pytest.mark.parametrize(
    ("family", "precision"),
    [*((family, "8g32") for family in sorted(FAMILIES)), ("olmoe", "2g64"), ("gpt_oss", "3g64s"), ("phimoe", "16")],
)
def test_header_bytes_bound_the_packed_headers(tiny_model: Saver, tmp_path: Path, family: str, precision: str) -> None:
    source, spec = described(tiny_model(family, dtype=torch.bfloat16))
    stored = {ref.key: torch.zeros(ref.shape, dtype=torch.bfloat16) for ref in spec.kept}
    matrices = [(e.names[m], getattr(e, m).shape) for e in spec.experts() for m in ("gate", "up", "down")]
    for name, shape in [*matrices, *((ref.name, ref.shape) for ref in spec.linears)]:
        for suffix, (size, dtype) in packed_shapes(shape, fitting(parse_precision(precision), *shape)).items():
            stored[f"{name}.{suffix}"] = torch.zeros(size, dtype=dtype)
    save_file(stored, tmp_path / "packed.safetensors", metadata={"format": "pt"})
    with (tmp_path / "packed.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    bound = inventory_of(source, spec).header_bytes
    assert header <= bound
    if precision == "8g32":
        assert bound < 1.15 * header + 4096


# --- what checkpoints in the wild add


@pytest.mark.parametrize(
    "family", sorted(set(FAMILIES) - {"ernie4_5_moe", "phimoe", "llama4", "deepseek_vl_v2", "molmo"})
)
def test_tied_heads(tiny_model: Saver, tmp_path: Path, family: str) -> None:
    path = tiny_model(family, tie_word_embeddings=True)
    source, spec = described(path)
    assert "lm_head" not in {ref.group for ref in spec.linears}
    assert not any("lm_head" in key for key in source.shapes)
    assert loaded(path).lm_head.weight is loaded(path).get_input_embeddings().weight

    both = Path(shutil.copytree(path, tmp_path / f"{family}-both"))
    embedding = next(ref.key for ref in spec.kept if ref.group == "embedding")
    rewrite(both, {"lm_head.weight": tensors(both)[embedding].clone()})
    source, again = described(both)
    assert again.ignored == ("lm_head.weight",)
    assert (again.layers, again.linears, again.kept) == (spec.layers, spec.linears, spec.kept)
    row = groups_table(again, source)[-1]
    assert (row.group, row.treatment, row.tensors) == ("ignored", "dropped", 1)

    rewrite(both, {"lm_head.weight": tensors(both)[embedding] + 1})
    with pytest.raises(ModelError, match="set tie_word_embeddings to false"):
        described(both)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_prediction_heads_are_ignored(tiny_model: Saver, tmp_path: Path, family: str) -> None:
    path = Path(shutil.copytree(tiny_model(family), tmp_path / family))
    _, plain = described(path)
    added = {
        "model.layers.3.eh_proj.weight": torch.zeros(64, 128),
        "model.layers.3.mlp.experts.0.up_proj.weight": torch.zeros(128, 64),
        "model.layers.3.shared_head.head.weight": torch.zeros(264, 64),
    }
    rewrite(path, added)
    edit_config(path, num_nextn_predict_layers=1)
    _, spec = described(path)
    assert spec.ignored == tuple(added)
    assert spec.layers == plain.layers
    edit_config(path, num_nextn_predict_layers=0)
    with pytest.raises(ModelError, match="has a layer 3; expected 3 layers"):
        described(path)
    edit_config(path, num_nextn_predict_layers=None)
    rewrite(path, {"model.layers.4.eh_proj.weight": torch.zeros(64, 128)})
    with pytest.raises(ModelError, match="has a layer 4"):
        described(path)


def test_ernies_prediction_blocks_are_ignored(tiny_model: Saver, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_model("ernie4_5_moe"), tmp_path / "ernie4_5_moe"))
    rewrite(
        path,
        {"model.mtp_block.0.mlp.up_proj.weight": torch.zeros(8, 64), "model.mtp_emb_norm.0.weight": torch.ones(64)},
    )
    assert len(described(path)[1].ignored) == 2
    assert loaded_info(path)["missing_keys"] == set()


def loaded_info(path: Path) -> dict[str, Any]:
    _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    return dict(info)


@families
def test_rotary_buffers_of_old_versions_are_ignored(tiny_model: Saver, family: str) -> None:
    source = open_source(tiny_model(family))
    spec = describe(source)
    prefix = spec.layers[0].module.split("layers.")[0]
    key = f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"
    again = spec_from(source.config, {**source.shapes, key: (8,)})
    assert again.ignored == (key,)
    assert again.kept == spec.kept


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v2", {"first_k_dense_replace": None}),
        ("deepseek_v3", {"first_k_dense_replace": None, "num_hidden_layers": 4}),
        ("glm4_moe", {"first_k_dense_replace": None}),
        ("glm4_moe", {"first_k_dense_replace": 0}),
        ("qwen2_moe", {"mlp_only_layers": None}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [1]}),
        ("qwen3_vl_moe", {"decoder_sparse_step": 2}),
        ("llama4_text", {"moe_layers": None, "interleave_moe_layer_step": 2}),
        ("llama4_text", {"moe_layers": None}),
        ("ernie4_5_moe", {"moe_layer_start_index": None}),
        ("ernie4_5_moe", {"num_hidden_layers": 5, "moe_layer_end_index": 3, "moe_layer_interval": 2}),
        ("ernie4_5_moe", {"num_hidden_layers": 4, "moe_layer_start_index": 2, "moe_layer_end_index": -1}),
    ],
)
def test_moe_layers_are_those_of_transformers(family: str, changes: dict[str, Any]) -> None:
    given = {name: value for name, value in changes.items() if value is not None}
    config = tiny_config(family, **given).to_dict()
    text = config.get("text_config", config)
    for name, value in changes.items():
        if value is None:
            text.pop(name)
    if "moe_layer_end_index" in given:
        text["moe_layer_end_index"] = given["moe_layer_end_index"]
    model = on_meta(AutoConfig.for_model(family, **{k: v for k, v in config.items() if k != "model_type"}), family)
    spec = spec_from(config, {k: tuple(t.shape) for k, t in model.state_dict().items()})
    assert [m.module for m in spec.layers] == [n for n, m in model.named_modules() if seam.is_experts(m)]


def on_meta(config: Any, family: str) -> Any:
    auto = AutoModelForImageTextToText if family in VLM else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize(
    ("family", "changes", "billions", "covered"),
    [
        ("olmoe", {"intermediate_size": 1024}, 6.919, 0.98),
        ("mixtral", {}, 46.703, 0.997),
        ("gpt_oss", {}, 116.829, 0.99),
        ("qwen3_moe", {**QWEN3_30B, "num_experts": 128}, 30.532, 0.98),
        ("ernie4_5_vl_moe", {}, 29.399, 0.96),
    ],
)
def test_full_size_models(family: str, changes: dict[str, Any], billions: float, covered: float) -> None:
    model = on_meta(AutoConfig.for_model(family, **changes), family)
    shapes = {k: tuple(t.shape) for k, t in model.state_dict().items()}
    config = {**model.config.to_dict(), "model_type": family}
    spec = spec_from(config, shapes)
    assert round(spec.inventory(0).parameters / 1e9, 3) == billions
    source = Source(Path(), config, shapes, dict.fromkeys(shapes, "BF16"), dict.fromkeys(shapes, "x"))
    assert coverage(groups_table(spec, source)) > covered
    assert inventory_of(source, spec).kept_bytes == 2 * spec.inventory(0).kept_parameters


def test_a_group_table_says_what_happens(tiny_model: Saver) -> None:
    source, spec = described(tiny_model("qwen3_vl_moe", dtype=torch.bfloat16))
    rows = {row.group: row for row in groups_table(spec, source)}
    assert list(rows) == [
        "routed_experts",
        "attention",
        "lm_head",
        "embedding",
        "norm",
        "projector",
        "router",
        "vision",
    ]
    assert rows["routed_experts"].treatment == "allocated"
    assert rows["routed_experts"].parameters == 2 * 8 * 3 * 64 * 128
    assert (rows["attention"].treatment, rows["attention"].precision) == ("quantized", "8g64s")
    assert rows["vision"].treatment == "kept"
    assert all(row.nbytes == 2 * row.parameters for row in rows.values())
    share = sum(rows[g].parameters for g in ("routed_experts", "attention", "lm_head"))
    assert coverage(tuple(rows.values())) == share / sum(prod(s) for s in source.shapes.values())
