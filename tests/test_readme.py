"""README's commands, run as they stand there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from mopeq.adapters import SUPPORTED
from mopeq.cli import main
from mopeq.fit import fit
from mopeq.load import model_config
from mopeq.measure import open_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The ``mopeq`` lines of its shell blocks, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mopeq ")]


def test_commands_run(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A sentence that is scored, and one that is not. " * 60)
    (tmp_path / "text.jsonl").write_text('{"text": "A sentence to calibrate on, again and again. "}\n' * 80)
    monkeypatch.setattr("builtins.input", lambda _: "")
    model = str(tiny_model("olmoe", hidden_size=128))
    around = 2**33 - fit("8GiB", model_config(model), open_model(model).inventory, 64, 4, "float32").weights
    device = f"{around + 900_000}B"  # the tiny model at about the budget of the other commands
    verbs, done = set(), 0
    for given in commands():
        if given[0] in ("quickstart", "serve"):  # tests of their own
            continue
        swap = {
            "MODEL": model,
            "1.4GB": "900KB",
            "8GiB": device,
            "8192": "64",
            "DIR": f"out{done}" if given[0] == "quantize" else f"out{done - 1}",
        }
        made = [swap.get(word, word) for word in given]
        if given[0] in ("analyze", "quantize"):
            made += ["--samples", "8", "--length", "32"]
        if given[0] == "eval":
            made += ["--windows", "8", "--length", "32"]
        if given[0] == "run":
            made += ["--max-new-tokens", "4"]
        assert main(made) == 0, (made, capsys.readouterr())
        done += given[0] == "quantize"
        verbs.add(given[0])
    assert verbs == {"describe", "quantize", "run", "chat", "eval", "report", "analyze", "allocate"}
    assert done == 4


def test_python_works(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["quantize", str(tiny_model("olmoe")), "-o", "DIR", "--uniform", "4g32", "--method", "rtn", "--no-eval"])
        == 0
    )
    block = re.search(r"```python\n(.*?)```", README, flags=re.S)
    assert block is not None
    names: dict[str, object] = {}
    exec(block[1], names)
    assert type(names["model"]).__name__ == "OlmoeForCausalLM"


def test_names_every_family() -> None:
    section = README[README.index("Families:") : README.index("docs/adding.md")]
    assert set(re.findall(r"[a-z0-9]+(?:_[a-z0-9]+)*", section)) >= set(SUPPORTED) - {"llama4_text"}


def test_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
