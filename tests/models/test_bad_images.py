"""What a user may hand over as an image: each is either seen upright in RGB, or refused with one sentence."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from mopeq.errors import DataError, InputError, ModelError
from mopeq.models.images import MAX_PIXELS, open_image
from mopeq.models.processing_deepseek_vl2 import DeepseekVLV2Processor
from mopeq.models.processing_molmoe import MolmoProcessor

FOLDER = Path(__file__).parent.parent / "fixtures" / "processors"
RED, BLUE = (200, 30, 20), (10, 40, 220)


@pytest.fixture(scope="module", params=["deepseek_vl2", "molmoe"])
def processor(request: pytest.FixtureRequest) -> Any:
    return AutoProcessor.from_pretrained(FOLDER / request.param)


def two_colours() -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    return image


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def asked(*images: Any, text: str = "What is it?") -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]


def run(processor: Any, conversation: Any) -> Any:
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True)


def sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "expected" in text
    assert ";" in text
    return text


def near(image: Image.Image, place: tuple[int, int], colour: tuple[int, int, int]) -> bool:
    return all(abs(a - b) < 40 for a, b in zip(image.getpixel(place), colour, strict=True))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "YCbCr"])
def test_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    form = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
    path = tmp_path / f"image.{form.lower()}"
    two_colours().convert(mode).save(path, form)
    image = open_image(path)
    assert image.mode == "RGB"
    assert image.size == (40, 20)
    if mode not in ("L", "LA", "1"):
        assert near(image, (5, 10), RED)
        assert near(image, (35, 10), BLUE)


def test_a_palette_with_transparency_keeps_its_colours() -> None:
    image = two_colours().convert("P", palette=Image.Palette.ADAPTIVE)
    seen = open_image(encoded(image, transparency=bytes([0, 255])))
    assert near(seen, (5, 10), RED)
    assert near(seen, (35, 10), BLUE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation: int) -> None:
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that the orientation undoes
    stored = two_colours()
    if orientation in back:
        stored = stored.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = open_image(encoded(stored, "JPEG", exif=exif, quality=95))
    assert seen.size == (40, 20)
    assert near(seen, (5, 10), RED)
    assert near(seen, (35, 10), BLUE)


def test_more_pixels_than_pillow_likes_are_one_sentence() -> None:
    with pytest.raises(DataError, match="the image is 10000 x 9000 pixels") as error:
        open_image(encoded(Image.new("1", (10000, 9000))))
    assert sentence(error)


def test_sources_are_alike(tmp_path: Path) -> None:
    import base64

    image = two_colours()
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data, address, np.asarray(image), image):
        assert open_image(source).tobytes() == image.tobytes()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_and_corrupt_files(form: str, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8))
    data = encoded(noise, form)
    path = tmp_path / "broken"
    for cut in (0, 3, len(data) // 3, len(data) * 2 // 3):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError) as error:
            open_image(path)
        assert str(path) in sentence(error)
    path.write_bytes(b"this is no image" * 10)
    with pytest.raises(DataError, match="no image that Pillow can read"):
        open_image(path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/nowhere/a.png", "no file /nowhere/a.png"),
        ("/", "cannot be read"),
        ("https://example.org/a.png", "download it first"),
        ("data:image/png;base64,%%%", "no base64"),
        ("data:image/svg+xml,<svg/>", "expected data:image/png;base64"),
        (b"", "no image that Pillow can read"),
        (7, "the image is a int"),
        (np.zeros((4, 4), np.uint8), "expected uint8"),
        (np.zeros((4, 4, 3), np.float32), "expected uint8"),
        (Image.new("I;16", (4, 4)), "mode I;16"),
        (Image.new("F", (4, 4)), "mode F"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels"),
    ],
)
def test_what_is_no_image(source: Any, words: str) -> None:
    with pytest.raises(DataError) as error:
        open_image(source)
    assert words in sentence(error)


def test_moving_pictures() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, RED)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError) as error:
        open_image(data, "film.gif")
    assert "film.gif has 3 frames" in sentence(error)


def test_one_pixel_is_enough(processor: Any) -> None:
    found = run(processor, asked(Image.new("RGB", (1, 1), RED)))
    assert torch.isfinite(found["images"]).all()
    assert len(found["input_ids"][0]) > 10


def test_sizes_beyond_reason(processor: Any) -> None:
    for size in ((20_000, 1), (1, 20_000)):
        with pytest.raises(DataError) as error:
            run(processor, asked(encoded(Image.new("RGB", size))))
        assert f"{size[0]} x {size[1]} pixels" in sentence(error)
    with pytest.raises(DataError) as error:
        run(processor, asked(encoded(Image.new("1", (20_000, 20_000)))))
    assert str(MAX_PIXELS) in sentence(error)


def test_long_images_within_reason(processor: Any) -> None:
    found = run(processor, asked(Image.new("RGB", (20_000, 300), RED)))
    assert torch.isfinite(found["images"]).all()


def test_as_many_image_tokens_as_images(processor: Any) -> None:
    token = processor.image_token
    for conversation in (
        [{"role": "user", "content": f"{token}\nWhat is it?"}],
        [{"role": "user", "content": "What is it?", "images": [two_colours()]}],
        asked(two_colours(), text=f"{token}\nand this?"),
    ):
        with pytest.raises(DataError) as error:
            run(processor, conversation)
        assert token in sentence(error)
    for text, images in ((f"{token} What?", None), ("What?", [two_colours()])):
        with pytest.raises(DataError) as error:
            processor(text=text, images=images)
        assert token in sentence(error)


def test_too_many_images() -> None:
    deepseek = AutoProcessor.from_pretrained(FOLDER / "deepseek_vl2")
    with pytest.raises(DataError) as error:
        run(deepseek, asked(*[two_colours()] * 200))
    assert "200 images" in sentence(error)
    assert "at most 4096 for this model" in sentence(error)
    molmoe = AutoProcessor.from_pretrained(FOLDER / "molmoe")
    with pytest.raises(InputError, match="MolmoE takes one"):
        run(molmoe, asked(two_colours(), two_colours()))


def test_videos_and_strange_messages(processor: Any) -> None:
    for call in (
        lambda: processor(text="What?", videos=["a.mp4"]),
        lambda: run(processor, [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]),
    ):
        with pytest.raises(InputError, match="give some of"):
            call()
    for conversation, words in (
        ([], "no messages"),
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"role": "user", "content": 7}], "content is 7"),
        ([{"role": "user", "content": [{"type": "image"}]}], "without an image"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "type 'sound'"),
    ):
        with pytest.raises(InputError, match=words):
            run(processor, conversation)
    with pytest.raises(InputError, match="no text"):
        processor(images=[two_colours()])
    with pytest.raises(InputError, match="2 images for 3 texts"):
        processor(text=["a", "b", "c"], images=[two_colours(), two_colours()])


def test_tokenizers_of_other_models() -> None:
    deepseek, molmoe = (AutoTokenizer.from_pretrained(FOLDER / name) for name in ("deepseek_vl2", "molmoe"))
    with pytest.raises(ModelError, match="lacks <im_start>"):
        MolmoProcessor(deepseek)
    with pytest.raises(ModelError, match="no bos_token"):
        DeepseekVLV2Processor(molmoe, [[384, 384]])


def test_settings_of_other_models() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "deepseek_vl2")
    for changed, words in (
        ({"candidate_resolutions": []}, "candidate_resolutions"),
        ({"candidate_resolutions": [[384, 768]]}, "candidate_resolutions"),
        ({"normalize": False}, "normalize"),
        ({"sft_format": "plain"}, "sft_format"),
    ):
        with pytest.raises(ModelError, match=words):
            DeepseekVLV2Processor(tokenizer, **{"candidate_resolutions": [[384, 384]], **changed})
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "molmoe")
    for changed, words in (
        ({"do_normalize": False}, "do_normalize"),
        ({"overlap_margins": [4, 2]}, "overlap_margins"),
        ({"image_token_length_w": 24}, "image_token_length_w"),
    ):
        with pytest.raises(ModelError, match=words):
            MolmoProcessor(tokenizer, **changed)
