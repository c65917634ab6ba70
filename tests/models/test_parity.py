"""DeepSeek-VL2 and MolmoE against the logits and choices of the published code, and mistakes that these would show."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

import reference
from mopeq.errors import InputError
from reference import DEEPSEEK, FOLDER, MOLMOE, NAMES, Case, batch, cases, fresh, loaded

TOLERANCE = 1e-4
"""In logits of size 4; the published code agrees with itself to 3e-6."""
CASES = [(name, case) for name in NAMES for case in cases(name)]
every_case = pytest.mark.parametrize(("name", "case"), CASES)
names = pytest.mark.parametrize("name", NAMES)


def routers(model: Any) -> dict[int, Any]:
    """Router modules by layer."""
    text = model.model.transformer if hasattr(model, "model") else model.language.model
    return {i: layer.mlp.gate for i, layer in enumerate(text.layers) if hasattr(layer.mlp, "gate")}


def run(model: Any, inputs: Any, **more: Any) -> tuple[Any, dict[int, Tensor]]:
    """The model's output, and what its routers chose: (tokens, k), sorted."""
    chosen: dict[int, Tensor] = {}
    handles = []
    for index, router in routers(model).items():

        def keep(module: Any, args: Any, output: Any, index: int = index) -> None:
            chosen[index] = output[2].sort(-1).values

        handles.append(router.register_forward_hook(keep))
    with torch.no_grad():
        output = model(**inputs, **more)
    for handle in handles:
        handle.remove()
    return output, chosen


def worst(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_case
def test_logits_and_choices(name: str, case: str, attention: str) -> None:
    wanted = cases(name)[case]
    output, chosen = run(loaded(name, attention), wanted.inputs)
    assert worst(output.logits, wanted.logits) < TOLERANCE
    assert set(wanted.routers) <= set(chosen)
    assert all(torch.equal(chosen[layer], index) for layer, index in wanted.routers.items())
    assert wanted.routers or name == MOLMOE


@every_case
def test_cached_decoding(name: str, case: str) -> None:
    wanted, model = cases(name)[case], loaded(name)
    output, _ = run(model, wanted.inputs, use_cache=True)
    for step in range(wanted.steps.shape[1]):
        token = {"input_ids": wanted.greedy[:, step : step + 1]}
        output, _ = run(model, token, past_key_values=output.past_key_values, use_cache=True)
        assert worst(output.logits[:, -1], wanted.steps[:, step]) < TOLERANCE


SETTINGS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


@every_case
def test_generate(name: str, case: str) -> None:
    """With a cache later steps get no images; without one all steps do."""
    wanted = cases(name)[case]
    for use_cache in (True, False):
        found = loaded(name).generate(**wanted.inputs, **SETTINGS, use_cache=use_cache)
        assert torch.equal(found[:, -8:], wanted.greedy)


MEMBERS = [*((name, ("one_wide", "text_only", "two_imgs")) for name in DEEPSEEK),
           (MOLMOE, ("one_tall", "one_square", "text_only"))]  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "members"), MEMBERS)
def test_padded_batch(name: str, members: tuple[str, ...], side: str) -> None:
    inputs, wanted = batch(name, *members, side=side)
    mask = inputs["attention_mask"].bool()
    output, _ = run(loaded(name), inputs)
    for row, case in enumerate(wanted):
        assert worst(output.logits[row, mask[row]], case.logits[0]) < TOLERANCE
    if name == MOLMOE and side == "right":  # the published processor gives no mask
        alone, _ = run(loaded(name), {k: v for k, v in inputs.items() if k != "attention_mask"})
        assert worst(alone.logits[mask], output.logits[mask]) == 0
    if side == "left":
        found = loaded(name).generate(**inputs, **SETTINGS)
        assert torch.equal(found[:, -8:], torch.cat([case.greedy for case in wanted]))


@names
def test_every_published_name_loads_and_is_saved_again(name: str, tmp_path: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(FOLDER / name, output_loading_info=True)
    assert not any(info.values()), info
    model.save_pretrained(tmp_path)
    stored, saved = (load_file(folder / "model.safetensors") for folder in (FOLDER / name, tmp_path))
    assert {key for key in stored if "attn_pool" not in key} == set(saved)  # the pooling head is never called
    assert all(torch.equal(stored[key], saved[key]) for key in saved)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    case = cases(name)["one_wide"]
    assert worst(run(again, case.inputs)[0].logits, case.logits) < TOLERANCE


# --- deliberate mistakes ----------------------------------------------------------------------------------------------

Change = Callable[[Any], None]


def part(path: str, **values: Any) -> Change:
    """Set entries of a part of the configuration."""

    def change(config: Any) -> None:
        target = getattr(config, path) if path else config
        for key, value in values.items():
            assert getattr(target, key) != value, f"{key} is {value} already"
            setattr(target, key, value)

    return change


def theta(config: Any) -> None:
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 20000.0}


VISION = [part("vision_config", hidden_act="gelu"), part("text_config", num_experts_per_tok=2), theta]
CONFIGS: list[tuple[str, Change]] = [
    *((name, change) for name in NAMES for change in VISION),
    *((name, part("vision_config", layer_norm_eps=1e-5)) for name in DEEPSEEK),
    *((name, part("text_config", routed_scaling_factor=1.5)) for name in DEEPSEEK),
    (DEEPSEEK[2], part("text_config", norm_topk_prob=False)),
    (DEEPSEEK[2], part("text_config", rope_interleave=False)),
    (MOLMOE, part("vision_config", layer_norm_eps=1e-6)),
    (MOLMOE, part("text_config", rms_norm_eps=1e-6)),
    (MOLMOE, part("text_config", norm_topk_prob=True)),
    (MOLMOE, part("", vit_layers=[-9, -2])),
    (MOLMOE, part("", vit_layers=[-1, -8])),
]


def change_of(model: Any, name: str, inputs: Any = None) -> float:
    case = cases(name)["one_wide"]
    return worst(run(model, inputs or case.inputs)[0].logits, case.logits)


@pytest.mark.parametrize(("name", "change"), CONFIGS)
def test_every_switch_matters(name: str, change: Change) -> None:
    config = AutoConfig.from_pretrained(FOLDER / name)
    change(config)
    assert change_of(fresh(name, config=config), name) > 3 * TOLERANCE


def scaled(pattern: str, factor: float = 0.0) -> Change:
    """Parameters and buffers whose names end so, times a factor."""

    def change(model: Any) -> None:
        found = [t for n, t in (*model.named_parameters(), *model.named_buffers()) if n.endswith(pattern)]
        assert found
        for tensor in found:
            tensor.mul_(factor)

    return change


def exchanged(model: Any) -> None:
    """Up before gate."""
    for layer in routers(model):
        text = model.model.transformer if hasattr(model, "model") else model.language.model
        fused = text.layers[layer].mlp.experts.gate_up_proj
        fused.copy_(torch.cat(fused.chunk(2, dim=1)[::-1], dim=1))


def tanh(model: Any) -> None:
    model.projector.layers[1] = nn.GELU("tanh")


def queries_are_values(model: Any) -> None:
    for layer in model.model.transformer.layers:
        q, v = layer.self_attn.q_proj.weight, layer.self_attn.v_proj.weight
        q.data, v.data = v.data, q.data


def colours_first(model: Any) -> None:
    kernel = model.model.vision_backbone.image_vit.embeddings.patch_embedding.weight
    kernel.copy_(kernel.permute(0, 2, 3, 1).reshape(kernel.shape))


MODULES: list[tuple[str, Change]] = [
    *((name, change) for name in NAMES for change in (exchanged, scaled("norm.weight", 1.1))),
    *((name, change) for name in DEEPSEEK for change in (
        tanh, scaled("shared_experts.down_proj.weight"), scaled("image_newline"), scaled("view_seperator"),
        scaled("position_embedding.weight"))),
    (DEEPSEEK[2], scaled("e_score_correction_bias")),
    *((MOLMOE, change) for change in (
        queries_are_values, colours_first, scaled("pad_embed"), scaled("class_embedding"), scaled("q_norm.weight", 0.5),
        scaled("image_pooling_2d.wk.weight"), scaled("pre_layrnorm.weight", 1.1))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), MODULES)
@torch.no_grad()
def test_every_tensor_matters(name: str, change: Change) -> None:
    model = copy.deepcopy(loaded(name))
    change(model)
    assert change_of(model, name) > 3 * TOLERANCE


def test_the_order_of_inputs_matters() -> None:
    """Global view first, and MolmoE's masks one crop behind its crops, as the published processors give them."""
    for name in DEEPSEEK:
        inputs = dict(cases(name)["one_wide"].inputs)
        inputs["images"] = inputs["images"].roll(-1, dims=1)
        assert change_of(loaded(name), name, inputs) > 3 * TOLERANCE
    inputs = dict(cases(MOLMOE)["one_wide"].inputs)
    inputs["image_masks"] = inputs["image_masks"].roll(1, dims=1)
    assert change_of(loaded(MOLMOE), MOLMOE, inputs) > 3 * TOLERANCE


# --- training, types, refusals ----------------------------------------------------------------------------------------


@names
def test_labels_give_the_usual_loss_and_gradients(name: str) -> None:
    model, case = copy.deepcopy(loaded(name)), cases(name)["one_wide"]
    labels = case.inputs["input_ids"].clone()
    labels[labels >= case.logits.shape[-1]] = -100
    labels[:, :-6] = -100
    loss = model(**case.inputs, labels=labels).loss
    wanted = nn.functional.cross_entropy(case.logits[0, -7:-1], labels[0, -6:])
    assert float(loss.detach()) == pytest.approx(float(wanted), abs=1e-5)
    loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    last = "model.vision_backbone.image_vit.encoder.layers.9."  # MolmoE's last block comes after those that are tapped
    assert without == {n for n, _ in model.named_parameters() if n.startswith(last)}


@names
def test_what_transformers_models_can_do(name: str) -> None:
    """docs/transformers.md: a static cache, beams, pickle, and outputs by name."""
    model, (inputs, _) = fresh(name), batch(name, "one_tall", "text_only")
    wanted = model.generate(**inputs, **SETTINGS)
    static = model.generate(**inputs, **SETTINGS, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, wanted)
    scores = [model.generate(**inputs, **SETTINGS, num_beams=n, return_dict_in_generate=True) for n in (1, 2)]
    assert torch.equal(scores[0].sequences, wanted)
    assert scores[1].sequences.shape == wanted.shape
    output = model(**inputs, output_hidden_states=True, output_router_logits=True)
    depth = model.config.text_config.num_hidden_layers
    assert len(output.hidden_states) == depth + 1
    assert len(output.router_logits) == len(routers(model))
    again = pickle.loads(pickle.dumps(fresh(name)))
    assert torch.equal(again(**inputs).logits, output.logits)


@names
def test_bfloat16(name: str) -> None:
    model = fresh(name, dtype=torch.bfloat16)
    case = cases(name)["one_wide"]
    logits = run(model, case.inputs)[0].logits
    assert logits.dtype == torch.bfloat16
    same = (logits.argmax(-1) == case.logits.argmax(-1)).float().mean()
    assert same > 0.8


def one(name: str, **changes: Any) -> dict[str, Any]:
    case: Case = cases(name)["one_wide"]
    return {**case.inputs, **changes}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (one(DEEPSEEK[0], images=None), "73 tokens stand for images and no images are given"),
        (one(DEEPSEEK[0], images_spatial_crop=torch.zeros(1, 1, 2).long()), "73 tokens stand for images and no images"),
        (one(DEEPSEEK[0], images_seq_mask=None), "images make 73 tokens, images_seq_mask has room for 0"),
        (one(DEEPSEEK[0], images_spatial_crop=torch.tensor([[[2, 3]]])), "images make 76 tokens, .* room for 73"),
        (one(DEEPSEEK[0], images_spatial_crop=torch.tensor([[[3, 3]]])), "images has 7 tiles .* asks for 10"),
        (one(MOLMOE, image_masks=None), "images come without image_masks or image_input_idx"),
        (one(MOLMOE, input_ids=torch.ones(1, 9).long(), attention_mask=None), "image_input_idx has .* of 9 tokens"),
    ],
)
def test_images_that_do_not_fit_the_tokens(inputs: dict[str, Any], words: str) -> None:
    name = MOLMOE if "image_masks" in inputs else DEEPSEEK[0]
    with pytest.raises(InputError, match=words):
        loaded(name)(**inputs)


def test_reference_covers_what_it_says() -> None:
    found = {name: set(cases(name)) for name in NAMES}
    assert all(
        found[n] >= {"one_wide", "one_tall", "two_imgs", "three_imgs", "text_only", "two_turns"} for n in DEEPSEEK
    )
    assert found[MOLMOE] == {"one_wide", "one_tall", "one_square", "text_only", "extra_vocab_ids"}
    assert reference.cases(MOLMOE)["extra_vocab_ids"].inputs["input_ids"].max() >= loaded(MOLMOE).config.head_rows
