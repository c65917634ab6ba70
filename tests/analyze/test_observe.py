from typing import Any

import pytest
import torch
from measuring import Make, batches, case
from torch import Tensor

from mopeq.analyze.observe import Routed, expert_rows, observe
from mopeq.errors import DataError, ModelError
from mopeq.precision import GROUPS
from mopeq.seam import activate, down_bias
from mopeq.source import read_group
from tiny import FAMILIES


def outputs(model: Any, spec: Any, batch: dict[str, Tensor]) -> dict[int, Tensor]:
    """The output of every MoE layer's experts, as the model computes it; 0 where they are for images alone."""
    size = batch["input_ids"].numel(), spec.layers[0].hidden_size
    found = {layer.index: torch.zeros(size) for layer in spec.layers if layer.for_images}
    handles = []
    for layer in spec.layers:

        def hook(module: Any, args: Any, out: Tensor, index: int = layer.index) -> None:
            rows = batch["input_ids"].numel()
            found[index] = out.reshape(-1, rows, out.shape[-1]).sum(0)

        handles.append(model.get_submodule(layer.module).register_forward_hook(hook))
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recorded_gives_the_output_of_the_experts(tiny_model: Make, family: str) -> None:
    model, source, spec = case(tiny_model, family)
    (batch,) = batches((2, 12))
    routed = observe(model, spec, [batch])
    wanted = outputs(model, spec, batch)
    assert set(routed) == {layer.index for layer in spec.layers}
    for layer in spec.layers:
        seen, module = routed[layer.index], model.get_submodule(layer.module)
        gate_up, down = (read_group(source, layer, group) for group in GROUPS)
        assert seen.index.shape == (24, layer.top_k)
        assert seen.index.dtype == torch.int64
        assert seen.weights.dtype == torch.float32
        made = torch.zeros(24, layer.hidden_size)
        for e, (rows, c) in enumerate(expert_rows(seen, len(layer.experts))):
            x, c = seen.hidden[rows], c[:, None]
            x, c = (x * c, torch.ones_like(c)) if seen.weighs_input else (x, c)
            z = activate(module, x @ gate_up[e].T, e) @ down[e].T
            bias = down_bias(module, e)
            made[rows] += c * (z if bias is None else z + bias)
        torch.testing.assert_close(made, wanted[layer.index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_gradients_agree_with_finite_differences(tiny_model: Make, family: str) -> None:
    model, _, spec = case(tiny_model, family)
    model = model.double()  # norms and routers stay in float32; a larger step would change the choice of experts
    model.set_experts_implementation("eager") if family != "llama4_text" else None
    (batch,) = batches((2, 6))
    routed = observe(model, spec, [batch], gradients=True, seed=3)
    with torch.no_grad():
        p = model(**batch, use_cache=False).logits.flatten(0, 1).float().softmax(-1)
        labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(3))
    for layer in spec.layers:
        gradient = routed[layer.index].gradient
        assert gradient is not None
        direction = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        losses = []
        for sign in (2e-4, -2e-4):
            moved = direction * sign

            def hook(module: Any, args: Any, out: Tensor, moved: Tensor = moved) -> Tensor:
                first = torch.zeros(out.reshape(-1, *moved.shape).shape, dtype=out.dtype)
                first[-1] = moved  # of experts that weigh their input, one
                return out + first.reshape(out.shape)

            handle = model.get_submodule(layer.module).register_forward_hook(hook)
            with torch.no_grad():
                log_p = model(**batch, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
            handle.remove()
            losses.append(float(-log_p.gather(1, labels).sum()))
        wanted = (losses[0] - losses[1]) / 4e-4
        assert float((gradient * direction).sum()) == pytest.approx(wanted, rel=1e-2, abs=5e-3)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_gradients_do_not_depend_on_how_experts_are_computed(tiny_model: Make, implementation: str) -> None:
    model, _, spec = case(tiny_model)
    data = batches((2, 9))
    wanted = observe(model, spec, data, gradients=True)
    model.set_experts_implementation(implementation)
    for index, seen in observe(model, spec, data, gradients=True).items():
        torch.testing.assert_close(seen.gradient, wanted[index].gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_dropped(tiny_model: Make, side: str) -> None:
    model, _, spec = case(tiny_model)
    alone = batches((1, 7))
    (padded,) = batches((2, 10), seed=1)
    part = slice(3, 10) if side == "left" else slice(0, 7)
    padded["input_ids"][1, part] = alone[0]["input_ids"][0]
    padded["attention_mask"][1] = 0
    padded["attention_mask"][1, part] = 1
    positions = {"position_ids": (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    found, wanted = observe(model, spec, [padded | positions]), observe(model, spec, alone)
    for index, seen in found.items():
        assert len(seen.hidden) == 17
        torch.testing.assert_close(seen.hidden[10:], wanted[index].hidden, rtol=1e-4, atol=1e-5)
        assert torch.equal(seen.index[10:], wanted[index].index)


def test_batches_follow_each_other_and_labels_follow_the_seed(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model)
    data = batches((2, 5), (1, 8))
    whole = observe(model, spec, data, gradients=True)[1]
    second = observe(model, spec, data[1:])[1]
    assert second.gradient is None
    assert second.vision is None
    torch.testing.assert_close(whole.hidden[10:], second.hidden)
    again, other = (observe(model, spec, data, gradients=True, seed=s)[1].gradient for s in (0, 1))
    assert whole.gradient is not None
    assert again is not None
    assert other is not None
    assert torch.equal(whole.gradient, again)
    assert not torch.equal(whole.gradient, other)


def test_stored_type(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model)
    seen = observe(model, spec, batches((1, 4)), gradients=True, store_dtype=torch.bfloat16)[0]
    assert seen.gradient is not None
    assert (seen.hidden.dtype, seen.gradient.dtype, seen.weights.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )


def test_images_keep_their_tokens_apart_and_predict_nothing(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model)
    data = batches((1, 6), (1, 4))
    data[0]["modality"] = torch.tensor([[0, 1, 1, 1, 0, 0]])
    seen = observe(model, spec, data, gradients=True)[1]
    assert seen.vision is not None
    assert seen.vision.tolist() == [False, True, True, True] + [False] * 6
    text = data[0]["input_ids"].clone()
    data[0]["modality"] = torch.tensor([[0, 1, 1, 1, 1, 1]])  # nothing is predicted from tokens 0 to 4
    gradient = observe(model, spec, data[:1], gradients=True)[1].gradient
    assert gradient is not None
    assert bool((gradient[:5] == 0).all())
    assert bool((gradient[5] != 0).any())
    assert torch.equal(text, data[0]["input_ids"])


def test_slots_without_an_expert_are_left_out(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model)
    model.set_experts_implementation("eager")

    def none(module: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = output
        index[0, 1] = 8  # what an expert-parallel router writes for experts that live elsewhere
        return logits, weights, index

    handle = model.get_submodule(spec.layers[0].router).register_forward_hook(none)
    seen = observe(model, spec, batches((1, 5)))[0]
    handle.remove()
    assert seen.index[0, 1] == -1
    assert sum(len(rows) for rows, _ in expert_rows(seen, 8)) == 9


def test_expert_rows() -> None:
    index = torch.tensor([[2, 0], [-1, 2], [0, 3]])
    weights = torch.tensor([[0.5, 0.4], [0.0, 0.3], [0.2, 0.1]])
    rows = expert_rows(Routed(torch.zeros(3, 4), index, weights, False), 5)
    assert [(r.tolist(), [round(float(v), 3) for v in w]) for r, w in rows] == [
        ([0, 2], [0.4, 0.2]),
        ([], []),
        ([0, 1], [0.5, 0.3]),
        ([2], [0.1]),
        ([], []),
    ]


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_left_as_it_was(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    observe(model, spec, batches((1, 4)), gradients=True)
    broken = batches((1, 4))
    broken[0]["attention_mask"] = torch.ones(1, 9, dtype=torch.int64)
    with pytest.raises(Exception):  # noqa: B017, PT011
        observe(model, spec, broken)
    assert hooks(model) == 0
    assert model.training
    assert model.model.layers[0].mlp.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.input_layernorm.weight", "layer 0: NaN or infinite values enter model.layers.0.mlp.experts"),
        ("model.layers.0.mlp.experts.down_proj", "layer 0: NaN or infinite values leave model.layers.0.mlp.experts"),
        ("model.layers.1.self_attn.v_proj.weight", "layer 1: NaN or infinite values enter"),
        ("lm_head.weight", "logits of batch 0 are NaN"),
    ],
)
def test_values_that_are_not_finite_are_located(tiny_model: Make, name: str, words: str) -> None:
    model, _, spec = case(tiny_model)
    with torch.no_grad():
        model.get_parameter(name).fill_(torch.nan)
    with pytest.raises(ModelError, match=words):
        observe(model, spec, batches((1, 6)))
    assert hooks(model) == 0


def test_bad_data(tiny_model: Make) -> None:
    model, _, spec = case(tiny_model)
    for empty in ([], batches((0, 4)), [{"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.zeros(1, 3)}]):
        with pytest.raises(DataError, match="no calibration tokens"):
            observe(model, spec, empty)
    wrong = batches((1, 4))
    wrong[0]["input_ids"][0, 0] = 264
    with pytest.raises(DataError, match="token 264 where the model's vocabulary has 264"):
        observe(model, spec, wrong)


def test_another_model(tiny_model: Make) -> None:
    model, _, _ = case(tiny_model)
    spec = case(tiny_model, "mixtral", num_hidden_layers=3).spec
    with pytest.raises(ModelError, match=r"no module 'model.layers.2.mlp.experts'"):
        observe(model, spec, batches((1, 4)))
