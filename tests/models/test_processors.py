"""The processors against what the published ones made, bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

from mopeq.models.processing_deepseek_vl2 import DeepseekVLV2Processor, best_resolution
from mopeq.models.processing_molmoe import MolmoProcessor, tiling

FOLDER = Path(__file__).parent.parent / "fixtures" / "processors"
DEEPSEEK, MOLMOE = (json.loads((FOLDER / name / "expected.json").read_text()) for name in ("deepseek_vl2", "molmoe"))


@pytest.fixture(scope="module")
def deepseek() -> DeepseekVLV2Processor:
    return AutoProcessor.from_pretrained(FOLDER / "deepseek_vl2")


@pytest.fixture(scope="module")
def molmoe() -> MolmoProcessor:
    return AutoProcessor.from_pretrained(FOLDER / "molmoe")


def sha(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def messages(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The case's conversation, each image's path with the message that has its token."""
    waiting = [FOLDER / "images" / name for name in case["images"]]
    return [
        {**message, "images": [waiting.pop(0) for _ in range(message["content"].count("<image>"))]}
        for message in case["conversation"]
    ]


def made(processor: Any, conversation: Any, **options: Any) -> Any:
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **options)


def check(found: Mapping[str, Tensor], hashes: Mapping[str, str]) -> None:
    for name, expected in hashes.items():
        value = found[name] if found[name].is_floating_point() else found[name].long()
        assert sha(value) == expected, name


@pytest.mark.parametrize("name", [name for name, case in DEEPSEEK["small"].items() if "conversation" in case])
def test_deepseek_conversations(deepseek: DeepseekVLV2Processor, name: str) -> None:
    case = DEEPSEEK["small"][name]
    found = made(deepseek, messages(case))
    hashes = dict(case["sha256"])
    if not case["images"]:  # the published processor makes a tile of zeros, which nothing reads
        assert {hashes.pop(key) for key in ("images", "images_spatial_crop", "images_seq_mask")}
        assert "images" not in found
    check(found, hashes)


def test_deepseek_batch(deepseek: DeepseekVLV2Processor) -> None:
    case = DEEPSEEK["small"]["batch_padded"]
    found = made(deepseek, [messages(DEEPSEEK["small"][member]) for member in case["members"]])
    check(found, case["sha256"])
    assert found["images"].shape[:2] == (3, 12)
    assert not found["images"][1].any()


def test_deepseek_real_geometry() -> None:
    expected = DEEPSEEK["real"]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "deepseek_vl2")
    processor = DeepseekVLV2Processor(tokenizer, expected["candidate_resolutions"])
    for size, best in expected["select_best_resolution"]:
        assert best_resolution(tuple(size), processor.candidate_resolutions) == tuple(best), size
    for case in expected["cases"].values():
        found = made(processor, messages(case))
        assert found["images_spatial_crop"][0].tolist() == case["images_spatial_crop"]
        check(
            {name: value[0] for name, value in found.items()},
            {"images": case["images_sha256_f32"], "input_ids": case["input_ids_sha256"]},
        )


def test_deepseek_history_and_answers(deepseek: DeepseekVLV2Processor) -> None:
    example = DEEPSEEK["real"]["token_stream_example"]
    found = made(deepseek, example["conversation"], return_assistant_tokens_mask=True)
    assert deepseek.decode(found["input_ids"][0]) == example["decoded"]
    assert deepseek.apply_chat_template(example["conversation"]) == example["decoded"]
    answers = found["input_ids"][found["assistant_masks"].bool()]
    assert deepseek.decode(answers) == "Hello.<｜end▁of▁sentence｜>"


def test_parts_are_the_same_as_tokens_in_the_text(deepseek: DeepseekVLV2Processor, molmoe: MolmoProcessor) -> None:
    path = FOLDER / "images" / "img_c_square.png"
    parts = [{"type": "image", "path": path}, {"type": "text", "text": "Describe."}]
    by_parts = made(deepseek, [{"role": "user", "content": parts}])
    by_text = made(deepseek, [{"role": "user", "content": "<image>\nDescribe.", "images": [path]}])
    rendered = deepseek.apply_chat_template([{"role": "user", "content": parts}])
    by_call = deepseek(text=rendered, images=path)
    for name, value in by_parts.items():
        assert torch.equal(value, by_text[name]), name
        assert torch.equal(value, by_call[name]), name
    by_parts = made(molmoe, [{"role": "user", "content": parts}])
    by_call = molmoe(text=molmoe.apply_chat_template([{"role": "user", "content": parts}]), images=[path])
    assert all(torch.equal(value, by_call[name]) for name, value in by_parts.items())


@pytest.mark.parametrize("name", [name for name, case in MOLMOE["small"].items() if "text" in case])
def test_molmoe_prompts(molmoe: MolmoProcessor, name: str) -> None:
    case = MOLMOE["small"][name]
    check({k: v[0] for k, v in made(molmoe, asked(case["text"], case["images"])).items()}, sequences(case))


def asked(text: str, images: list[str]) -> list[dict[str, Any]]:
    parts = [{"type": "image", "path": FOLDER / "images" / name} for name in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def sequences(case: Mapping[str, Any]) -> dict[str, str]:
    return dict(case["sha256"])


def test_molmoe_batch_is_filled_up_on_the_left(molmoe: MolmoProcessor) -> None:
    names = ("one_tall", "one_square", "text_only")
    batch = made(molmoe, [asked(MOLMOE["small"][n]["text"], MOLMOE["small"][n]["images"]) for n in names])
    patch = molmoe.tokenizer.get_vocab()["<im_patch>"]
    for row, name in enumerate(names):
        case = MOLMOE["small"][name]
        keep = batch["attention_mask"][row].bool()
        assert sha(batch["input_ids"][row][keep]) == case["sha256"]["input_ids"]
        places = batch["image_input_idx"][row]
        assert (batch["input_ids"][row][places[places >= 0]] == patch).all()
        if "image_input_idx" in case["sha256"]:
            single = torch.where(places >= 0, places - (~keep).sum(), places)
            assert sha(single) == case["sha256"]["image_input_idx"]
        else:
            assert (batch["images"][row] == -1).all()
            assert (places < 0).all()


def test_molmoe_real_geometry() -> None:
    expected = MOLMOE["real"]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "molmoe")
    for (width, height), few, many in expected["tilings"]:
        for most, grid in ((12, few), (36, many)):
            assert tiling((height - 112, width - 112), 224, most) == tuple(grid), (width, height)
    known = tokenizer.get_vocab()
    renamed = {known[token]: number for token, number in expected["special_ids"].items()}
    renamed[tokenizer.eos_token_id] = expected["eos_id"]
    for case in expected["cases"].values():
        processor = MolmoProcessor(tokenizer, max_crops=case["max_crops"])
        found = made(processor, asked(case["text"], [case["image"]]))
        ids = found["input_ids"][0].tolist()
        end = len(ids) - ids[::-1].index(known["<im_end>"])
        tail = case["input_ids_tail"]
        tail = tail[tail.index(expected["special_ids"]["<im_end>"]) + 1 :]
        ids = [renamed[number] for number in ids[:end]] + tail  # the text's own ids are those of another tokenizer
        assert sha(torch.tensor(ids)) == case["input_ids_sha256_i64"]
        check(
            {name: value[0] for name, value in found.items()},
            {
                "images": case["images_sha256_f32"],
                "image_masks": case["image_masks_sha256_f32"],
                "image_input_idx": case["image_input_idx_sha256_i64"],
            },
        )


@pytest.mark.parametrize("name", ["deepseek_vl2", "molmoe"])
def test_saved_processors_come_back(name: str, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(FOLDER / name)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    assert again.to_dict() == processor.to_dict()
    assert again.image_token_ids == processor.image_token_ids


def test_published_files_need_no_trust(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "molmoe", tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    published = {**json.loads(path.read_text()), "auto_map": {"AutoProcessor": "preprocessing_molmo.MolmoProcessor"}}
    path.write_text(json.dumps(published))
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "model"), MolmoProcessor)
