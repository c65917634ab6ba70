"""ERNIE 4.5 VL, whose layers have experts for text and experts for images: every verb, with images and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from transformers.models.ernie4_5_vl_moe.processing_ernie4_5_vl_moe import Ernie4_5_VLMoeProcessor

import killing
import tiny
from compensating import nearer
from mopeq import measure as measuring
from mopeq.allocate import allocate
from mopeq.analyze import Routed, fisher, observe
from mopeq.analyze.forward import sampled_loss
from mopeq.analyze.observe import expert_rows
from mopeq.cli import main
from mopeq.compensate import Both
from mopeq.data.conversations import conversation_batches, read_conversations
from mopeq.layers import ImageExperts, image_experts
from mopeq.load import load, load_original
from mopeq.measure import Calibration, Prepared, measure, measure_prepared, observed, open_model, split_texts
from mopeq.pack import pack_model
from mopeq.precision import GROUPS, Precision, PrecisionMap
from mopeq.quantize import quantize
from mopeq.seam import activate
from mopeq.source import read_group
from mopeq.stats import Stats, read_json

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the processor's
Make = Callable[..., Path]
KEYS = [1, image_experts(1), 2, image_experts(2)]
OPTIONS = [Precision(2, 32), Precision(4, 32)]
METRICS = ("frequency", "gate_mass", "gradient_norm", "moment_trace", "output_peak", "output_error", "fisher_error")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ '<image_start><image><image_end>' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tiny_model: Make) -> Path:
    return tiny_model("ernie4_5_vl_moe", vocab_size=tiny.VOCABULARY + 8)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    names = {f"{kind}{part}_token": f"<{kind}{part}>" for kind in ("image", "video") for part in ("", "_start", "_end")}
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=names)
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    images = Ernie4_5_VLMoeImageProcessorPil(patch_size=4, merge_size=2, size=size)
    with pytest.MonkeyPatch.context() as patch:  # that for videos takes torchvision
        patch.setattr(Ernie4_5_VLMoeProcessor, "check_argument_for_proper_class", lambda *_: None)
        return Ernie4_5_VLMoeProcessor(images, tokenizer, None, TEMPLATE)


@pytest.fixture(autouse=True)
def its_processor(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("load", "measure", "trial"):
        monkeypatch.setattr(f"mopeq.{module}.load_processor", lambda path: processor)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Ten conversations, most with an image."""
    path, lines = tmp_path_factory.mktemp("pictures"), []
    for i in range(10):
        Image.effect_noise((16 + 8 * (i % 3), 24), 90).convert("RGB").save(path / f"{i}.png")
        images = [f"{i}.png"] * (i % 4 != 3)
        said = {"role": "user", "content": "<image>" * len(images) + f"What is number {i}?"}
        lines.append(json.dumps({"messages": [said, {"role": "assistant", "content": "Grey."}], "images": images}))
    (path / "data.jsonl").write_text("\n".join(lines))
    return Calibration(str(path / "data.jsonl"), samples=8, batch_size=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("text") / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i}: the quick brown fox. " * 40}) for i in range(12)))
    return Calibration(str(path), samples=4, length=64)


def batches_of(pictures: Calibration, processor: Any, size: int = 4) -> list[dict[str, Tensor]]:
    conversations = read_conversations(str(pictures.data))
    return conversation_batches(conversations, processor, samples=8, batch_size=size, seed=0)


def added(seen: Routed, opened: Prepared, model: Any, key: int) -> Tensor:
    """What one set of experts adds to each token, from its weights in the files."""
    layer = opened.spec.layer(key)
    module = model.get_submodule(layer.module)
    gate_up, down = (read_group(opened.source, layer, group) for group in GROUPS)
    made = torch.zeros(seen.hidden.shape)
    for e, (rows, weight) in enumerate(expert_rows(seen, len(layer.experts))):
        made[rows] += weight[:, None] * (activate(module, seen.hidden[rows] @ gate_up[e].T, e) @ down[e].T)
    return made


def test_both_sets_together_are_the_block(folder: Path, processor: Any, pictures: Calibration) -> None:
    """Each token goes to one of them; outputs and gradients are those of the block, without its shared experts."""
    opened, model, data = open_model(folder), load_original(folder), batches_of(pictures, processor)
    assert [layer.index for layer in opened.spec.layers] == KEYS
    assert any(not batch["attention_mask"].all() for batch in data)
    routed = observe(model, opened.spec, data, gradients=True, seed=4)
    kept = [batch["attention_mask"].bool() for batch in data]
    vision = torch.cat([batch["moe_mm_token_type_ids"][mask] for batch, mask in zip(data, kept, strict=True)]).bool()
    given: dict[int, list[Tensor]] = {1: [], 2: []}
    shared: dict[int, list[Tensor]] = {1: [], 2: []}
    for number in given:
        block = model.get_submodule(opened.spec.layer(number).dealer)

        def output(module: nn.Module, args: Any, made: Any, number: int = number) -> None:
            made[0].retain_grad()
            given[number].append(made[0])

        def beside(module: nn.Module, args: Any, made: Tensor, number: int = number) -> None:
            shared[number].append(made.detach())

        block.register_forward_hook(output)
        block.shared_experts.register_forward_hook(beside)
    generator = torch.Generator().manual_seed(4)
    for batch in data:
        inputs = {name: value for name, value in batch.items() if name not in ("modality", "labels")}
        sampled_loss(model(**inputs, use_cache=False).logits, batch, generator).backward()
    for number in given:
        sets = {key: routed[key] for key in (number, image_experts(number))}
        for key, seen in sets.items():
            mine = vision if isinstance(key, ImageExperts) else ~vision
            assert torch.equal((seen.index >= 0).all(1), mine)
            assert torch.equal((seen.index >= 0).any(1), mine)
        want = torch.cat([(a - b)[m] for a, b, m in zip(given[number], shared[number], kept, strict=True)])
        made = sum(added(seen, opened, model, key) for key, seen in sets.items())
        torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-5)
        gradient = torch.cat([a.grad[m] for a, m in zip(given[number], kept, strict=True) if a.grad is not None])
        both = sum(seen.gradient for seen in sets.values() if seen.gradient is not None)
        torch.testing.assert_close(both, gradient, rtol=1e-4, atol=1e-6)


def test_layer_by_layer_measures_what_the_whole_model_does(folder: Path, pictures: Calibration) -> None:
    streamed = measure(folder, METRICS, calibration=pictures, options=OPTIONS)
    whole = measure_prepared(observed(open_model(folder), pictures), METRICS, options=OPTIONS)
    assert streamed.metrics == whole.metrics
    assert all(list(rows) == KEYS for rows in streamed.metrics.values())
    tokens = [sum(streamed.metric("tokens")[key]) for key in KEYS]
    assert tokens[:2] == tokens[2:]
    assert sum(tokens[:2]) == 2 * streamed.info["tokens"], "each token takes two experts, of one set"
    for key in KEYS:
        assert sum(streamed.metric("frequency")[key]) == pytest.approx(1)
        assert sum(streamed.metric("fisher_error/down/2g32")[key]) > 0


def test_fisher_of_a_kind_is_that_of_its_experts(folder: Path, processor: Any, pictures: Calibration) -> None:
    """Where the tokens called image tokens are those that go to the experts for images; none do in text."""
    opened, model = open_model(folder), load_original(folder)
    alone = [batch for batch in batches_of(pictures, processor, 1) if "pixel_values" in batch][:2]
    data = [{**batch, "modality": batch["moe_mm_token_type_ids"]} for batch in alone]
    whole, vision, words = (fisher(model, opened.spec, data, seed=1, kind=k)[0] for k in ("", "vision", "text"))
    for key in KEYS:
        mine, other = (vision, words) if isinstance(key, ImageExperts) else (words, vision)
        assert mine[key] == pytest.approx(whole[key], rel=1e-4)
        assert max(whole[key]) > 0
        assert set(other[key]) == {0.0}


def test_text_alone_leaves_the_experts_for_images_without_tokens(
    folder: Path, text: Calibration, tmp_path: Path
) -> None:
    """They cost nothing that was measured, are listed, and are quantized by plain squared error."""
    stats = measure(folder, [*METRICS, "fisher", "hessian_trace"], calibration=text, options=OPTIONS)
    unseen = {f"{key}.{e}" for key in KEYS if isinstance(key, ImageExperts) for e in range(8)}
    assert {name for name, tokens in stats.info["starved"].items() if tokens == 0} == unseen
    for name, rows in stats.metrics.items():
        assert all(set(rows[key]) == {0.0} for key in KEYS if isinstance(key, ImageExperts)), name
    fewest = allocate(stats, budget="3.2bpw").experts["down"]
    assert all(set(fewest[key]) == {OPTIONS[0]} for key in KEYS if isinstance(key, ImageExperts))
    packed = quantize(folder, tmp_path / "out", uniform=OPTIONS[0], calibration=text, evaluated=False)
    assert {unit.rpartition(".")[0] for unit in packed.fallbacks} >= unseen
    plain = quantize(folder, tmp_path / "plain", uniform=OPTIONS[0], method="rtn", evaluated=False)
    with torch.no_grad():
        ids = torch.arange(1, 25)[None]
        assert load(packed.path)(input_ids=ids).logits.isfinite().all()
        assert not torch.equal(load(packed.path)(input_ids=ids).logits, load(plain.path)(input_ids=ids).logits)


def test_one_budget_for_both_and_the_same_files_either_way(folder: Path, pictures: Calibration, tmp_path: Path) -> None:
    how: dict[str, Any] = {"options": OPTIONS, "calibration": pictures}
    packed = quantize(folder, tmp_path / "out", budget="3.2bpw", **how)
    assert packed.guard
    assert packed.inventory.expert_bits(packed.precisions) <= 3.2
    assert packed.bytes <= packed.inventory.total_bytes(packed.precisions)
    assert packed.evaluation is not None
    record = read_json(packed.path / "mopeq" / "precision.json")["experts"]
    assert list(record["down"]) == ["1", "2", "1.vision", "2.vision"]
    seen = observed(open_model(folder), pictures, texts=split_texts(pictures, folder)[0], gradients=False)
    again = pack_model(seen, packed.precisions, tmp_path / "whole")
    one, other = tiny.tensors(packed.path), tiny.tensors(again.path)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_a_killed_run_goes_on_between_the_two(
    folder: Path, pictures: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"calibration": pictures, "options": OPTIONS, "out": tmp_path / "stats.json"}
    real, seen = measuring.layer_metrics, list[int]()

    def fails_once(source: Any, layer: Any, *rest: Any, **more: Any) -> Any:
        seen.append(layer.index)
        if seen == [2, image_experts(2)]:
            raise KeyboardInterrupt
        return real(source, layer, *rest, **more)

    monkeypatch.setattr(measuring, "layer_metrics", fails_once)
    with pytest.raises(KeyboardInterrupt):
        measure(folder, METRICS, **how)
    found = measure(folder, METRICS, resume=True, **how)
    assert seen[2:] == [image_experts(2), 1, image_experts(1)]
    assert found.metrics == measure(folder, METRICS, **{**how, "out": None}).metrics


def test_maps_that_take_no_budget(folder: Path) -> None:
    """MoPEQ's clusters within each set; uniform; bounds by key."""
    stats = measure(folder, ["inverse_norm"])
    clusters = allocate(stats, method="kmeans", options=[Precision(bits, 32) for bits in (2, 3, 4)])
    assert list(clusters.layers) == sorted(KEYS)
    assert all({p.bits for p in row} == {2, 3, 4} for row in clusters.experts["down"].values())
    alone = Stats(replace(stats.model, layers={k: v for k, v in stats.model.layers.items() if k == KEYS[1]}),
                  {"inverse_norm": {KEYS[1]: stats.metric("inverse_norm")[KEYS[1]]}})  # fmt: skip
    apart = allocate(alone, method="kmeans", options=[Precision(bits, 32) for bits in (2, 3, 4)])
    assert apart.experts["down"][KEYS[1]] == clusters.experts["down"][KEYS[1]]
    uniform = allocate(stats, method="uniform", options=OPTIONS[:1])
    assert uniform == replace(PrecisionMap.uniform(stats.model.experts, OPTIONS[0]), note=uniform.note)


def test_from_the_command_line(
    folder: Path, processor: Any, pictures: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*command: Any) -> str:
        assert main([str(word) for word in command]) == 0
        return capsys.readouterr().out

    stats, chosen, out = tmp_path / "stats.json", tmp_path / "map.json", tmp_path / "packed"
    data = ("--data", pictures.data, "--samples", 8)
    assert "1.vision-2.vision" in said("describe", folder)
    said("analyze", folder, "--metrics", "frequency,fisher_error", *data, "--levels", "2g32,4g32", "-o", stats)
    said("allocate", stats, "--budget", "3.2bpw", "-o", chosen)
    said("quantize", folder, "--map", chosen, "--method", "rtn", "-o", out)
    image = Path(str(pictures.data)).with_name("0.png")
    ask = ("run", out, "--prompt", "What?", "--max-new-tokens", 8, "--json")
    assert json.loads(said(*ask, "--image", image))["text"] != json.loads(said(*ask))["text"]
    said("eval", out, "--perplexity", pictures.data, "--against", folder)
    said("report", out)
    page = (out / "mopeq" / "report.html").read_text()
    assert ">1.vision<" in page
    assert "1.vision.7: " in page
    assert main(["export", str(out), "--format", "dequantized", "-o", str(tmp_path / "no")]) == 2
    assert "two sets of experts" in capsys.readouterr().err


def test_both_sets_make_up_for_earlier_layers(folder: Path, pictures: Calibration, tmp_path: Path) -> None:
    assert nearer(folder, pictures, tmp_path) < 0.97


def test_making_up_goes_on_between_the_two(
    folder: Path, pictures: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"uniform": OPTIONS[0], "calibration": pictures, "compensate": True, "evaluated": False}
    quantize(folder, tmp_path / "whole", **how)
    real, taken = Both.take, list[int]()

    def fails_once(both: Both, layer: Any, *rest: Any) -> None:
        taken.append(layer.index)
        if taken == [1, image_experts(1)]:
            raise KeyboardInterrupt
        real(both, layer, *rest)

    monkeypatch.setattr(Both, "take", fails_once)
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, tmp_path / "out", **how)
    quantize(folder, tmp_path / "out", **how, resume=True)
    assert taken[2:] == [1, image_experts(1), 2, image_experts(2)], "the first is packed again for what runs on"
    assert killing.contents(tmp_path / "out") == killing.contents(tmp_path / "whole")
