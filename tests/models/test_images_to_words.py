"""From an image file to words: processor, model and decoding together, against the published code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
from mopeq.cli import main
from mopeq.errors import InputError, ModelError
from mopeq.load import load_processor, takes_images
from mopeq.runtime.generate import generate
from reference import DEEPSEEK, FILES, FOLDER, MOLMOE, PROCESSORS, cases, folder_of, loaded


def prompt_of(name: str, case: str) -> Any:
    found = json.loads((PROCESSORS / FILES[name] / "expected.json").read_text())["small"][case]
    paths = [PROCESSORS / "images" / image for image in found["images"]]
    if "text" in found:
        parts = [*({"type": "image", "path": path} for path in paths), {"type": "text", "text": found["text"]}]
        return [{"role": "user", "content": parts}]
    return [
        {**m, "images": [paths.pop(0) for _ in range(m["content"].count("<image>"))]} for m in found["conversation"]
    ]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (DEEPSEEK[0], "one_wide"),
        (DEEPSEEK[0], "two_imgs"),
        (DEEPSEEK[0], "two_turns"),
        (DEEPSEEK[0], "text_only"),
        (MOLMOE, "one_tall"),
        (MOLMOE, "text_only"),
    ],
)
def test_words_are_the_published_ones(name: str, case: str, tmp_path: Path) -> None:
    processor = load_processor(folder_of(name, tmp_path))
    made = generate(loaded(name), processor, prompt_of(name, case), max_new_tokens=8)
    expected = cases(name)[case]
    assert made.prompt_tokens == expected.inputs["input_ids"].shape[1]
    assert list(made.tokens) == expected.greedy[0].tolist()[: len(made.tokens)]
    assert len(made.tokens) == 8


def test_run_with_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(DEEPSEEK[0], tmp_path)
    image = str(PROCESSORS / "images" / "img_a_wide.png")
    command = ["run", str(folder), "--prompt", "Describe this image.", "--max-new-tokens", "8", "--json"]
    assert main([*command, "--image", image]) == 0
    said = json.loads(capsys.readouterr().out)
    processor = load_processor(folder)
    assert said["text"] == processor.decode(cases(DEEPSEEK[0])["one_wide"].greedy[0], skip_special_tokens=True)
    assert main([*command, "--image", str(tmp_path / "gone.png")]) == 2
    error = capsys.readouterr().err
    assert "no file" in error
    assert len(error.strip().splitlines()) == 1


def test_chat_with_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image goes with the first words; an empty line ends."""
    folder = folder_of(DEEPSEEK[0], tmp_path)
    lines = iter(["Describe this image.", "Which colours?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    image = str(PROCESSORS / "images" / "img_a_wide.png")
    assert main(["chat", str(folder), "--image", image, "--max-new-tokens", "8"]) == 0
    said = capsys.readouterr()
    processor = load_processor(folder)
    assert processor.decode(cases(DEEPSEEK[0])["one_wide"].greedy[0], skip_special_tokens=True) in said.out
    assert "no chat template" not in said.err


def test_models_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_tiny("olmoe", tmp_path / "olmoe")
    assert not takes_images(folder)
    assert main(["run", str(folder), "--prompt", "a", "--image", "a.png"]) == 2
    assert "takes no images" in capsys.readouterr().err


def test_folders_without_the_right_processor(tmp_path: Path) -> None:
    folder = folder_of(DEEPSEEK[0], tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["language_config"]["vocab_size"] = 380
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has token 387; expected them below 380"):
        load_processor(folder)
    (folder / "processor_config.json").unlink()
    with pytest.raises(ModelError, match=r"candidate_resolutions|no processor"):
        load_processor(folder)
    shutil.copy(FOLDER / DEEPSEEK[0] / "config.json", path)
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(ModelError, match="no processor that transformers can load"):
        load_processor(folder)


def test_a_processor_refuses_videos_in_generation() -> None:
    processor = load_processor_of_fixture()
    video = [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}]
    with pytest.raises(InputError, match="a video"):
        generate(loaded(DEEPSEEK[0]), processor, video)


def load_processor_of_fixture() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(PROCESSORS / "deepseek_vl2")
