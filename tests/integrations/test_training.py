"""Gradients through packed weights, and LoRA adapters beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.trainer_utils import validate_quantization_for_training

import packing
from mopeq.integrations.peft import LoraQLinear, lora
from mopeq.runtime import MixedExperts, packed_modules

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers
IDS = torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["olmoe", "gpt_oss", "llama4", "deepseek_v3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
         tiny_model: Callable[..., Path]) -> tuple[Path, Any]:  # fmt: skip
    """A packed folder of each kind of experts module, and the dense model with the same weights."""
    folder, original = tmp_path_factory.mktemp(request.param), tiny_model(request.param)
    packing.pack_model(original, folder / "packed")
    return folder / "packed", load(packing.dequantized(original, folder / "packed", folder / "dense"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    auto: Any = AutoModelForImageTextToText if "llama4" in str(folder) else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    packing.pack_model(tiny_model("olmoe"), folder / "packed")
    return folder / "packed"


def gradients(model: Any) -> dict[str, Tensor]:
    """Of a loss with respect to the embeddings, and to every parameter that has one."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model.zero_grad()
    model(inputs_embeds=embedded).logits.float().square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"": embedded.grad, **found}


def test_gradients_equal_the_dense_models(pair: tuple[Path, Any]) -> None:
    """Of inputs, norms, routers and biases: all that is not packed learns as if nothing were."""
    folder, dense = pair
    got, want = gradients(load(folder)), gradients(dense)
    assert got.keys() <= want.keys()
    assert any("gate" in name or "router" in name for name in got)
    for name, gradient in got.items():
        assert float((gradient - want[name]).norm() / want[name].norm()) < 1e-4, name


def test_no_dense_weight_waits_for_its_gradient(olmoe: Path) -> None:
    """Between forward and backward only activations are kept; codes are dequantized again."""
    model, kept = load(olmoe), []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model(IDS, labels=IDS).loss
    weights = {(128, 64), (64, 128), (64, 64), (264, 64)}
    assert kept
    assert not weights & {shape for shape in kept if shape != tuple(model.get_input_embeddings().weight.shape)}
    loss.backward()


def test_bfloat16_and_autocast(olmoe: Path) -> None:
    got = gradients(load(olmoe, torch.bfloat16))[""]
    want = gradients(load(olmoe))[""]
    assert got.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(got.float().flatten(), want.flatten(), dim=0) > 0.98
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(load(olmoe))[""]
    assert mixed.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(mixed.flatten(), want.flatten(), dim=0) > 0.98


def adapted(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "lora_dropout": 0.0, **options}
    return get_peft_model(load(folder), lora(LoraConfig(**settings)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_learns_and_is_loaded_again(checkpointing: bool, olmoe: Path, tmp_path: Path) -> None:
    model = adapted(olmoe)
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, LoraQLinear)
    if checkpointing:
        model.base_model.model.train()
        model.enable_input_require_grads()
        for layer in model.base_model.model.model.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    before = {name: b.clone() for name, b in model.named_buffers()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=2e-2), []
    for _ in range(5):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
    model.save_pretrained(tmp_path / "adapter")
    config = lora(LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load(olmoe), tmp_path / "adapter", config=config)
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


def test_first_gradients_of_adapters_equal_the_dense_models(pair: tuple[Path, Any]) -> None:
    folder, dense = pair
    if "olmoe" not in str(folder):
        pytest.skip("one family is enough: the linear is the same")
    found = []
    dense.requires_grad_(False)
    for model in (load(folder), dense):
        torch.manual_seed(0)
        wrapped = get_peft_model(model, lora(LoraConfig(r=4, target_modules=["q_proj", "o_proj"])))
        wrapped(IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad})
    got, want = found
    assert got.keys() == want.keys()
    assert any(g.abs().max() > 0 for g in got.values())
    assert all(torch.allclose(got[n], want[n], rtol=1e-3, atol=1e-6) for n in got)


def test_trainer_takes_adapters_and_nothing_else(olmoe: Path) -> None:
    validate_quantization_for_training(adapted(olmoe))
    model = load(olmoe)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(model)
    model.add_adapter(lora(LoraConfig(r=4, target_modules=["q_proj"])))
    validate_quantization_for_training(model)


def test_what_lora_cannot_do_is_refused(olmoe: Path) -> None:
    with pytest.raises(ValueError, match=r"Target module QLinear.* is not supported"):
        get_peft_model(load(olmoe), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"Target module MopeqOlmoeExperts(?s:.)* is not supported"):
        adapted(olmoe, target_modules=["experts"])
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(AttributeError, match="QLinear is packed and has no weight"):
            adapted(olmoe, **options)
    model = adapted(olmoe)
    with pytest.raises(AttributeError, match=r"QLinear is packed and has no weight.*merging adapters"):
        model.merge_and_unload()
    assert any(isinstance(m, MixedExperts) for m in packed_modules(model).values())
