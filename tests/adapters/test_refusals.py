"""What describe refuses, and in which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mopeq.adapters import SUPPORTED, describe, spec_from
from mopeq.adapters.layouts import Sizes, fused, per_expert
from mopeq.errors import ModelError
from mopeq.source import Source, open_source
from tiny import FAMILIES, VLM

Saver = Callable[..., Path]
families = pytest.mark.parametrize("family", sorted(FAMILIES))
NO_OPTIONS: dict[str, Any] = {}
ANY = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(config: dict[str, Any], shapes: Any, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        spec_from(config, shapes)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.fixture
def olmoe(tiny_model: Saver) -> Source:
    return open_source(tiny_model("olmoe"))


def test_unknown_architecture(olmoe: Source) -> None:
    refused(
        {"model_type": "olmo3e", "num_experts": 4}, {}, "'olmo3e' is not supported", *SUPPORTED, "did you mean olmoe?"
    )
    refused({"model_type": "zzz"}, olmoe.shapes, "'zzz' is not supported")
    published = {"model_type": "ernie4_5_moe_vl", "moe_num_experts": [4, 4]}
    refused(published, {}, "as it was published", "expected transformers' own ernie4_5_vl_moe")
    refused(NO_OPTIONS, olmoe.shapes, "model_type None", "expected one of")


def test_dense_models(olmoe: Source) -> None:
    refused(
        {"model_type": "llama"}, {"model.layers.0.mlp.up_proj.weight": (8, 8)}, "'llama' is dense", "Mixture-of-Experts"
    )
    qwen = {**olmoe.config, "model_type": "qwen3_moe", "mlp_only_layers": [0, 1]}
    refused(qwen, olmoe.shapes, "no MoE layers")
    deepseek = {**olmoe.config, "model_type": "deepseek_v3", "first_k_dense_replace": 2}
    refused(deepseek, olmoe.shapes, "no MoE layers")


@pytest.mark.parametrize("value", [None, 0, -1, 2.0, "8", True, [8]])
@pytest.mark.parametrize("name", ["num_hidden_layers", "num_experts", "hidden_size", "intermediate_size"])
def test_sizes_that_are_not_numbers(olmoe: Source, name: str, value: object) -> None:
    words = f"no {name}" if value is None and name != "num_experts" else name
    refused({**olmoe.config, name: value}, olmoe.shapes, words, "expected a whole number from 1 on")


def test_sizes_that_contradict_each_other(olmoe: Source) -> None:
    refused({**olmoe.config, "num_local_experts": 4}, olmoe.shapes, "num_experts = 8, num_local_experts = 4")
    refused({**olmoe.config, "num_experts_per_tok": 9}, olmoe.shapes, "9 of 8 experts")
    refused({**olmoe.config, "num_hidden_layers": 10**12}, olmoe.shapes, "num_hidden_layers = 1000000000000")
    refused({**olmoe.config, "num_experts": 10**12}, olmoe.shapes, "experts are missing", "experts.8.gate_proj.weight")
    refused(
        {**olmoe.config, "hidden_size": 32}, olmoe.shapes, "gate_proj.weight has shape [128, 64]; expected [128, 32]"
    )
    refused({**olmoe.config, "intermediate_size": 64}, olmoe.shapes, "has shape [128, 64]; expected [64, 64]")
    refused({**olmoe.config, "num_experts": 7}, olmoe.shapes, "experts.7.", "config.json says 7 experts")
    refused({**olmoe.config, "num_hidden_layers": 1}, olmoe.shapes, "not understood", "model.layers.1.")
    refused({**olmoe.config, "num_hidden_layers": 3}, olmoe.shapes, "layer 2 has no expert tensors")
    qwen = {**olmoe.config, "model_type": "qwen3_moe", "mlp_only_layers": 3}
    refused(qwen, olmoe.shapes, "mlp_only_layers = 3", "expected a list")


def test_a_vision_language_model_without_a_language_part(tiny_model: Saver) -> None:
    source = open_source(tiny_model("llama4"))
    refused({"model_type": "llama4"}, source.shapes, "has no text_config")


def test_missing_experts_are_named(olmoe: Source) -> None:
    gone = {k: s for k, s in olmoe.shapes.items() if ".1.mlp.experts.5." not in k}
    refused(olmoe.config, gone, "model.layers.1.mlp.experts.5.gate_proj.weight", "expected 8 experts", "download")
    none = {k: s for k, s in olmoe.shapes.items() if ".1.mlp.experts." not in k}
    refused(olmoe.config, none, "layer 1 has no expert tensors", "expected 8 experts")


def test_half_a_fused_pair(tiny_model: Saver) -> None:
    source = open_source(tiny_model("gpt_oss"))
    gone = {k: s for k, s in source.shapes.items() if k != "model.layers.0.mlp.experts.down_proj"}
    refused(source.config, gone, "model.layers.0.mlp.experts.down_proj is missing")
    flipped = {k: (4, 256, 64) if k.endswith("gate_up_proj") else s for k, s in source.shapes.items()}
    refused(source.config, flipped, "has shape [4, 256, 64]; expected [4, 64, 256]")


@pytest.mark.parametrize("suffix", ["_blocks", "_scales"])
def test_packed_experts_without_a_quantization_config(tiny_model: Saver, suffix: str) -> None:
    source = open_source(tiny_model("gpt_oss"))
    added = {**source.shapes, f"model.layers.0.mlp.experts.gate_up_proj{suffix}": (4, 256, 2, 16)}
    refused(source.config, added, "not understood", "look quantized already", "16 or 32 bits")


def test_a_router_of_another_size(olmoe: Source) -> None:
    key = "model.layers.1.mlp.gate.weight"
    refused(olmoe.config, {**olmoe.shapes, key: (4, 64)}, f"{key} [4, 64]", "expected a router [8, 64]")
    refused(olmoe.config, {k: s for k, s in olmoe.shapes.items() if k != key}, "layer 1 has no router")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.k_proj.weight", (32, 48), "expected [32, 64]"),
        ("model.layers.1.self_attn.o_proj.weight", (48, 64), "expected [64, 64]"),
        ("model.layers.1.self_attn.o_proj.weight", (64,), "expected a matrix"),
        ("lm_head.weight", (264, 48), "expected [264, 64]"),
        ("model.embed_tokens.weight", (264, 48), "expected [264, 64]"),
    ],
)
def test_matrices_that_do_not_fit_the_hidden_size(
    olmoe: Source, name: str, shape: tuple[int, ...], expected: str
) -> None:
    refused(olmoe.config, {**olmoe.shapes, name: shape}, f"{name} has shape {list(shape)}", expected)


def test_weights_that_are_not_floats(olmoe: Source) -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ModelError, match=rf"{re.escape(key)} is stored as I8; expected one of F16, BF16, F32, F64"):
        describe(Source(olmoe.path, olmoe.config, olmoe.shapes, {**olmoe.dtypes, key: "I8"}, olmoe.files))


@families
def test_no_tensor_can_be_missing(tiny_model: Saver, family: str) -> None:
    source = open_source(tiny_model(family))
    tower = re.compile(
        r".*(visual|vision|projector|resampler|new_embedding|sam_model|qwen2_model|view_sep)|image_newline|(model\.norm|lm_head)\.bias"
    )
    for key in source.shapes:
        if not tower.match(key):
            router = "router" in key or key.endswith((".gate.weight", ".gate.weight_1"))
            name = "router" if router else re.split(r"\.(?:layers|blocks)\.", key)[-1].partition(".")[2]
            if family == "molmo":  # the message has the names of modules
                last = name.split(".")[-2] if "." in name else ""
                name = (
                    MOLMO.get(last, name.removeprefix("attn.")) if last in MOLMO or name.startswith("attn.") else name
                )
            refused(source.config, {k: s for k, s in source.shapes.items() if k != key}, name)


@pytest.mark.parametrize("widths", [None, 128, [128], [128, 192, 64], [128, 0], [128, True], [128, "192"]])
def test_widths_of_two_kinds_of_experts(tiny_model: Saver, widths: Any) -> None:
    source = open_source(tiny_model("ernie4_5_vl_moe"))
    text = {**source.config["text_config"], "moe_intermediate_size": widths}
    refused({**source.config, "text_config": text}, source.shapes, f"= {widths!r}", "expected a list of 2 sizes")


def test_a_tensor_under_both_of_its_names(tiny_model: Saver) -> None:
    source = open_source(tiny_model("molmo"))
    name = "model.transformer.layers.0.self_attn.o_proj.weight"
    refused(source.config, {**source.shapes, name: (64, 64)}, name, "blocks.0.attn.attn_out.weight are the same tensor")


def test_another_language_model(tiny_model: Saver) -> None:
    source = open_source(tiny_model("internvl"))
    text = {**source.config["text_config"], "model_type": "qwen3"}
    refused({**source.config, "text_config": text}, source.shapes, "this internvl has 'qwen3' as its language model")


MOLMO = {"attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "att_proj": "self_attn.q_proj",
         "attn_out": "self_attn.o_proj", "ln_f": "norm", "wte": "embed_tokens"}  # fmt: skip


@families
def test_no_unknown_tensor_is_passed_over(tiny_model: Saver, family: str) -> None:
    source = open_source(tiny_model(family))
    spec = describe(source)
    prefix = spec.layers[0].module.split("layers.")[0]
    names = ["extra", "model.extra.weight", f"{prefix}layers.0.extra.weight", f"{prefix}layers.1.mlp.extra.bias",
             f"{prefix}layers.01.input_layernorm.weight", f"{prefix}layers.0.self_attn.q_proj.weight_scale_inv",
             f"{spec.layers[0].module}.99.up_proj.weight", f"{spec.layers[0].router}.extra"]  # fmt: skip
    for name in names:
        refused(source.config, {**source.shapes, name: (3,)}, "1 tensors of this", "not understood", name)
    refused(source.config, {**source.shapes, **dict.fromkeys(names, (3,))}, "8 tensors of this", names[0], " ...")


@ANY
@given(st.data())
def test_changed_shapes_never_surprise(tiny_model: Saver, data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    source = open_source(tiny_model(family))
    key = data.draw(st.sampled_from(sorted(source.shapes)))
    shape = tuple(data.draw(st.lists(st.integers(0, 70), max_size=4)))
    shapes = {**source.shapes, key: shape}
    try:
        spec = spec_from(source.config, shapes)
    except ModelError as error:
        found = str(error)
    else:  # only what stays as it is may have any shape, and the free sides of matrices
        found = next((ref.key for ref in (*spec.kept, *spec.linears) if ref.key == key), "")
        assert shape == source.shapes[key] or key not in {r.key for e in spec.experts() for r in (e.gate, e.up, e.down)}
    assert found


def test_a_square_tensor_that_may_be_stored_either_way_is_read_as_transformers_does() -> None:
    either = fused("up", "down", stored="either")
    found = either("", {"up": (2, 8, 16), "down": (2, 8, 8)}, Sizes(2, 8, 8, 1))
    assert found is not None
    assert [(ref.transposed, ref.rows) for ref in found[1]] == [(True, (0, 8, 1)), (True, (8, 16, 1)), (False, None)]


def test_layouts_that_are_not_there() -> None:
    sizes = Sizes(2, 8, 4, 1)
    assert fused("up", "down")("model.", {"up": (2, 8, 8)}, sizes) is None
    assert per_expert("experts", "a", "b", "c")("model.", {"model.experts.up": (2, 8, 8)}, sizes) is None


def test_every_family_is_a_language_or_vision_language_model() -> None:
    assert {name for name, changes in FAMILIES.items() if "vision_config" in changes} == set(VLM)
