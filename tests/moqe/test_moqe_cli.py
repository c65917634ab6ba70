"""``mopeq moqe`` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sets import CODE, PROSE, write_texts

from mopeq.cli import main
from reference_digits import digits, save_digits, train_resnet

Make = Callable[..., Path]
WINDOWS = ("--prompt-tokens", 8, "--length", 32)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["moqe", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code, _, err = run(capsys, *words)
    lines = [line for line in err.splitlines() if line.startswith("mopeq: ")]
    assert code != 0
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def test_text_from_build_to_chat(
    tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_model("olmoe"), tmp_path / "set"
    seen = write_texts(tmp_path / "seen.jsonl", CODE * 20)
    other = write_texts(tmp_path / "other.jsonl", *(f"{i} {PROSE * 6}" for i in range(6)))
    small = ("--data", seen, "--samples", 4, "--length", 32)
    code, shown, _ = run(capsys, "build", model, "--variants", "rtn-3g32,gptq-3g32", "-o", out, *small)
    assert code == 0
    assert "equal tensors are stored once" in shown
    assert "no router yet" in refused(capsys, "run", out, "--prompt", "hello")
    assert "calibrated a variant" in refused(capsys, "train", out, "--data", seen, *WINDOWS)
    code, shown, _ = run(capsys, "train", out, "--data", other, *WINDOWS, "--epochs", 2)
    assert code == 0
    assert "on inputs kept apart" in shown
    prompts = ("--prompt", "hello", "--prompt", "import os")
    code, shown, _ = run(capsys, "run", out, *prompts, "--max-new-tokens", 3, "--resident", 1, "--json")
    found = json.loads(shown)
    assert len(found["generations"]) == 2
    assert found["resident_bytes"] > 0
    code, shown, err = run(capsys, "run", out, *prompts, "--max-new-tokens", 3)
    assert "import os" in shown
    assert "MB resident" in err
    lines: Iterator[str] = iter(["hi", "more", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert run(capsys, "chat", out, "--max-new-tokens", 3)[0] == 0
    text = tmp_path / "judge.txt"
    text.write_text(PROSE * 30)
    code, shown, _ = run(
        capsys, "eval", out, "--text", text, *WINDOWS, "--windows", 6, "--against", model, "--pairs", 1
    )
    assert code == 0
    for name in ("rtn-3g32", "routed", "random", "oracle", "ensemble", "original", "best single", "with the router"):
        assert name in shown
    assert json.loads((out / "evaluation.json").read_text())["inputs"]["all"] == 6


def test_images_from_build_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = digits()
    model = train_resnet(tmp_path / "resnet", images[:128], labels[:128], epochs=1, sizes=(8, 16))
    parts = [save_digits(tmp_path / name, images[rows], labels[rows]) for name, rows in
             (("seen", slice(0, 60)), ("learn", slice(60, 160)), ("judge", slice(160, 220)))]  # fmt: skip
    out = tmp_path / "set"
    code, _, _ = run(capsys, "build", model, "--variants", "rtn-4bit,gptq-4bit", "--images", parts[0], "-o", out)
    assert code == 0
    assert "expected --images DIR" in refused(capsys, "train", out)
    code, shown, _ = run(capsys, "train", out, "--images", parts[1], "--epochs", 2)
    assert code == 0
    code, shown, _ = run(capsys, "eval", out, "--images", parts[2], "--against", model)
    assert code == 0
    assert "% right" in shown
    file = next((parts[2] / "3").iterdir())
    code, shown, _ = run(capsys, "run", out, "--image", file, "--json")
    assert json.loads(shown)["images"][0]["variant"] in ("rtn-4bit", "gptq-4bit")
    assert "expected language models" in refused(capsys, "chat", out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("build", "MODEL", "--variants", "rtn-3g32", "-o", "OUT"), "expected at least two"),
        (("build", "MODEL", "--variants", "rtn-3g32,nowhere", "-o", "OUT"), "check the path"),
        (("build", "MODEL", "--variants", "rtn-3g32,rtn-4g32", "-o", "OUT", "--images", "."), "--images is for image"),
        (("build", "nowhere/at/all", "--variants", "rtn-3g32,rtn-4g32", "-o", "OUT"), "nowhere/at/all"),
        (("train", "nowhere"), "no folder nowhere"),
        (("run", "MODEL", "--prompt", "x"), "no set of variants"),
        (("eval", "nowhere"), "no folder nowhere"),
    ],
)
def test_one_sentence(
    words: tuple[str, ...], said: str, tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"MODEL": tiny_model("olmoe"), "OUT": tmp_path / "out"}
    assert said in refused(capsys, *(paths.get(word, word) for word in words))
    assert not list(tmp_path.iterdir()), "nothing is left behind"
