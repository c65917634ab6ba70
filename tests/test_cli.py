"""Every verb as a user types it, and what bad input gets: one sentence, an exit code, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mopeq.analyze.slab as slab_module
import mopeq.quantize as quantize_module
from mopeq.checkpoint import PackedWriter, verify
from mopeq.cli import main
from mopeq.precision import PrecisionMap
from mopeq.stats import Stats, read_json
from tiny import edit_config, rewrite, tensors

Make = Callable[..., Path]
FEW = ["--samples", "4", "--length", "32"]
SMALL = [*FEW, "--group-size", "32"]


@pytest.fixture
def folder(tiny_model: Make) -> Path:
    return tiny_model("olmoe", dtype=torch.bfloat16)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Pack my box with five dozen liquor jugs. " * 100)
    return path


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "packed"
    assert main(["quantize", str(folder), "-o", str(out), "--uniform", "4g32", "--method", "rtn", "--no-eval"]) == 0
    return out


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and the one sentence of a command that must fail."""
    code, _, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("mopeq: ")]
    assert code != 0
    assert len(lines) == 1
    assert "Traceback" not in err
    return code, lines[0]


# -- what works -------------------------------------------------------------------------------------------------------


def test_describe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "describe", folder)
    assert code == 0
    assert "routed_experts" in out
    assert "every tensor is accounted for" in out
    code, out, _ = run(capsys, "describe", folder, "--json")
    found = json.loads(out)
    assert sum(row["parameters"] for row in found["groups"]) == sum(t.numel() for t in tensors(folder).values())
    assert 0.8 < found["coverage"] < 1


def test_analyze_allocate_quantize_by_hand(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The long way round, with a map that a person edited."""
    stats, edited, out = tmp_path / "stats.json", tmp_path / "precision.json", tmp_path / "out"
    metrics = "frequency,gate_mass,inverse_norm,fisher_error"
    code, shown, _ = run(capsys, "analyze", folder, "--data", text, *SMALL, "--metrics", metrics, "-o", stats)
    assert code == 0
    assert "frequency" in shown
    assert set(metrics.split(",")[:3]) <= set(Stats.from_json(read_json(stats)).metrics)
    code, shown, _ = run(capsys, "allocate", stats, "--budget", "3.6bpw", "-o", edited)
    assert code == 0
    assert "bits per expert weight" in shown
    made = json.loads(edited.read_text())
    made["experts"]["down"]["0"][3] = "8g64s"
    edited.write_text(json.dumps(made))
    code, shown, _ = run(capsys, "quantize", folder, "-o", out, "--map", edited, "--data", text, *FEW)
    assert code == 0
    assert "times smaller" in shown
    assert verify(out).precisions.of(0, 3, "down").bits == 8


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_allocate_as_mopeq_does(scope: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats, out = tmp_path / "stats.json", tmp_path / "precision.json"
    assert run(capsys, "analyze", folder, "--metrics", "inverse_norm", "-o", stats)[0] == 0
    flags = ("--method", "kmeans", "--score", "inverse_norm", "--scope", scope, "--levels", "2,3,4", "--group-size", 32)
    code, _, _ = run(capsys, "allocate", stats, *flags, "-o", out)
    assert code == 0
    made = PrecisionMap.from_json(read_json(out))
    assert {p.bits for p in made.histogram()} == {2, 3, 4}
    assert made.experts["gate_up"] == made.experts["down"], "MoPEQ gives an expert one precision"


def test_run_chat_eval_report(
    packed: Path, folder: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, "run", packed, "--prompt", "hello", "--max-new-tokens", 4, "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == 4
    lines: Iterator[str] = iter(["hi", "more", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert run(capsys, "chat", packed, "--max-new-tokens", 3)[0] == 0
    flags = ("--against", folder, "--perplexity", text, "--length", 32, "--windows", 8, "--dtype", "float32")
    code, out, _ = run(capsys, "eval", packed, *flags, "--speed")
    assert code == 0
    assert "KL to the original" in out
    assert "decode" in out
    saved = read_json(packed / "mopeq" / "evaluation.json")
    assert saved["divergence"]["kl"]["value"] > 0
    assert saved["speed"]["decode"] > 0
    assert run(capsys, "eval", packed, "--perplexity", text, "--length", 32, "--windows", 4)[0] == 0
    again = read_json(packed / "mopeq" / "evaluation.json")
    assert again["divergence"] == saved["divergence"], "an evaluation that asks for less keeps what there was"
    assert again["perplexity"] != saved["perplexity"]
    code, out, _ = run(capsys, "report", packed)
    assert code == 0
    page = (packed / "mopeq" / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    for name in ("quickstart", "describe", "analyze", "allocate", "quantize", "run", "chat", "eval", "report"):
        assert name in out


def test_the_command_line_is_cheap() -> None:
    code = "import sys; from mopeq.cli import main; assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- what does not ----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def test_unknown_architecture(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(broken, model_type="olmoee")
    code, said = fails(capsys, "describe", broken)
    assert code == 2
    assert "'olmoee' is not supported" in said
    assert "did you mean olmoe?" in said


def test_dense_model(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(broken, model_type="llama", num_experts=None, num_experts_per_tok=None, router_aux_loss_coef=None)
    rewrite(broken, {key: None for key in tensors(broken) if "expert" in key})
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "expert" not in k}))
    code, said = fails(capsys, "quantize", broken, "-o", broken.parent / "out", "--budget", "3bpw")
    assert code == 2
    assert "dense" in said


def test_missing_shard(tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sharded = Path(shutil.copytree(tiny_model("olmoe", max_shard_size="300KB"), tmp_path / "sharded"))
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    code, said = fails(capsys, "describe", sharded)
    assert code == 2
    assert gone.name in said


def test_weights_that_are_not_numbers(broken: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    weight = tensors(broken)[name].clone()
    weight[3, 4] = float("nan")
    rewrite(broken, {name: weight})
    out = broken.parent / "out"
    for how in (("--uniform", "4g32", "--method", "rtn"), ("--budget", "3.5bpw", "--data", text, *SMALL)):
        code, said = fails(capsys, "quantize", broken, "-o", out, *how)
        assert code == 2
        assert "not finite" in said or "NaN" in said
        assert not out.exists()
    assert not list(broken.parent.glob("*.partial*"))


def test_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["describe"], ["run", "--prompt", "x"], ["eval"], ["analyze"]):
        code, said = fails(capsys, verb[0], tmp_path / "nowhere", *verb[1:])
        assert code == 2
        assert "nowhere" in said


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "has no text"),
        ("\n \n", "has no text"),
        ("short", "kept apart"),
        ("a short line of text", "fewer than one"),
    ],
)
def test_empty_calibration(
    content: str, found: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.txt", tmp_path / "out"
    data.write_text(content)
    code, said = fails(capsys, "quantize", folder, "-o", out, "--budget", "3bpw", "--data", data, *SMALL)
    assert code == 2
    assert found in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("budget", "found"),
    [
        ("1.5bpw", "below the smallest map"),
        ("17bpw", "above 16 bits"),
        ("10KB", "below the smallest map"),
        ("3 cats", "expected bits per expert weight such as 3.0bpw"),
        ("-3bpw", "expected bits per expert weight such as 3.0bpw"),
    ],
)
def test_budgets_out_of_reach(
    budget: str, found: str, folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, said = fails(capsys, "quantize", folder, "-o", out, f"--budget={budget}", "--data", text, *SMALL)
    assert code == 2
    assert found in said
    assert not out.exists()


def test_map_for_another_model(
    folder: Path, tiny_model: Make, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats, made, out = tmp_path / "s.json", tmp_path / "p.json", tmp_path / "out"
    assert run(capsys, "analyze", tiny_model("mixtral"), "--metrics", "inverse_norm", "-o", stats)[0] == 0
    flags = ("--method", "kmeans", "--score", "inverse_norm", "--group-size", 32, "--levels", "2,3")
    assert run(capsys, "allocate", stats, *flags, "-o", made)[0] == 0
    code, said = fails(capsys, "quantize", folder, "-o", out, "--map", made, "--data", text, *FEW)
    assert code == 2
    assert "for another model" in said
    assert not out.exists()


def test_a_map_that_is_not_one(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "p.json"
    for content, found in (("{", "not readable JSON"), ("[]", "not a precision map"), ("{}", "not a precision map")):
        bad.write_text(content)
        code, said = fails(capsys, "quantize", folder, "-o", tmp_path / "out", "--map", bad)
        assert code == 2
        assert found in said


def test_existing_output(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    code, said = fails(capsys, "quantize", folder, "-o", out, "--uniform", "4g32", "--method", "rtn")
    assert code == 2
    assert "exists already; give a new folder" in said
    code, said = fails(capsys, "quickstart", "-o", out)
    assert code == 2
    assert "was not made by mopeq quickstart" in said
    assert [p.name for p in out.iterdir()] == ["precious"]
    code, said = fails(capsys, "analyze", folder, "--metrics", "inverse_norm", "-o", tmp_path / "no" / "stats.json")
    assert "no folder" in said


def test_already_packed(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = fails(capsys, "quantize", packed, "-o", tmp_path / "again", "--uniform", "4g32", "--method", "rtn")
    assert code == 2
    assert "packed" in said


def test_damaged_checkpoint(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next(packed.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    code, said = fails(capsys, "run", packed, "--prompt", "x")
    assert code == 1
    assert shard.name in said


def test_small_disk(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known in advance, and met on the way."""
    out = tmp_path / "out"
    command = ("quantize", folder, "-o", out, "--uniform", "4g32", "--method", "rtn", "--no-eval")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        code, said = fails(capsys, *command)
        assert code == 2
        assert "free" in said
    calls = 0

    def full(self: PackedWriter, name: str, tensor: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, name, tensor)

    original = PackedWriter.add
    monkeypatch.setattr(PackedWriter, "add", full)
    code, said = fails(capsys, *command)
    assert code == 2
    assert "disk" in said
    assert not out.exists()
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--uniform", "3,4"], "expected one precision"),
        (["--uniform", ","], "expected one precision"),
        (["--uniform", "0"], "expected one precision"),
        (["--uniform", "3", "--data", ""], "--data is empty"),
        (["--uniform", "3", "--rest", "attention=4,attention=8"], "names attention twice"),
        (["--uniform", "3", "--rest", "embedding=4", "--method", "rtn"], "unknown groups ['embedding']"),
        (["--uniform", "3", "--length", "600"], "takes at most 512"),
        (["--budget", "4bpw", "--cost", "frequency"], "no cost 'frequency'"),
        (["--uniform", "3", "--max-memory", "3bpw"], "expected a size such as 8GB or 900MiB"),
        (["--uniform", "3", "--max-memory", "1MB"], "--max-memory is 0.001 GB and this needs "),
    ],
)
def test_quantize_refuses(
    arguments: list[str], found: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = fails(capsys, "quantize", folder, "-o", tmp_path / "out", "--group-size", "32", *arguments)
    assert code == 2
    assert found in said
    assert list(tmp_path.iterdir()) == []


def test_a_map_brings_its_own_rest(folder: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = packed / "mopeq" / "precision.json"
    out = packed.with_name("other")
    _, said = fails(capsys, "quantize", folder, "-o", out, "--map", made, "--rest", "attention=4")
    assert 'edit "rest"' in said


def test_output_where_no_folder_can_be(folder: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = fails(capsys, "quantize", folder, "-o", text / "out", "--budget", "4bpw", *SMALL)
    assert code == 2
    assert "no folder that can be written to" in said


def test_run_and_eval_refuse(folder: Path, packed: Path, tiny_model: Make, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny_model("mixtral")
    for arguments, found in (
        (("run", packed, "--prompt", "x", "--max-new-tokens", "512"), "at most 512 in all"),
        (("run", packed, "--prompt", "x", "--device", "nowhere"), "'nowhere' cannot be used"),
        (("eval", packed, "--length", "513"), "takes at most 512"),
        (("eval", packed, "--against", other), "is not the original of"),
        (("eval", packed, "-o", packed / "no" / "evaluation.json"), "no folder"),
        (("allocate", packed / "mopeq" / "precision.json", "--symmetric", "--budget", "3"), "belongs to --levels"),
        (("allocate", "stats.json", "--budget", "3", "--score", "fisher"), "belongs to --method kmeans"),
        (("quantize", other, "-o", "x", "--uniform", "4", "--cost", "output_error"), "belongs to --budget"),
        (("quantize", other, "-o", "x", "--map", "p.json", "--group-size", "64"), "belongs to --budget"),
        (("quantize", other, "-o", "x", "--uniform", "4", "--cost-share", "1"), "belongs to --budget"),
        (("quantize", other, "-o", "x", "--budget", "3bpw", "--cost-share", "2"), "cost share 2.0; expected a share"),
        (("align", packed, "--against", other, "--cost-share", "1"), "belongs to mopeq analyze"),
        (("quantize", other, "-o", "x", "--budget", "3bpw", "--context", "64"), "belongs to --fit"),
    ):
        code, said = fails(capsys, *arguments)
        assert code == 2
        assert found in said


@pytest.mark.parametrize("seed", ["-1", "4294967296", "x"])
def test_seeds_that_not_every_library_takes(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["allocate", "stats.json", "--budget", "3", "--seed", seed])
    assert stop.value.code == 2
    assert "expected a whole number" in capsys.readouterr().err


def test_asked_to_terminate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(slab_module, "read_group", lambda *_: signal.raise_signal(signal.SIGTERM))
    command = ("quantize", folder, "-o", tmp_path / "out", "--uniform", "4g32", "--method", "rtn", "--no-eval")
    code, said = fails(capsys, *command)
    assert code == 130
    assert "interrupted" in said
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_interrupted_while_comparing(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_module, "compared", interrupted)
    out = tmp_path / "out"
    command = ("quantize", folder, "-o", out, "--uniform", "4g32", "--method", "rtn", "--data", text, *SMALL)
    code, said = fails(capsys, *command)
    assert code == 130
    assert f"{out} is complete" in said
    verify(out)
    assert read_json(out / "mopeq" / "run.json")["format"] == "mopeq-run"


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_interrupted_at_any_layer(
    at: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, read = 0, slab_module.read_group

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(slab_module, "read_group", interrupted)
    command = ("quantize", folder, "-o", tmp_path / "out", "--uniform", "4g32", "--method", "rtn", "--no-eval")
    code, said = fails(capsys, *command)
    assert code == 130
    assert "interrupted" in said
    if at < 3:  # in the first layer: nothing is finished
        assert list(tmp_path.iterdir()) == []
        return
    assert "the same command with --resume goes on" in said
    code, said = fails(capsys, *command)
    assert code == 2
    assert "out.partial holds an unfinished run; the same command with --resume goes on with it" in said
    assert run(capsys, *command, "--resume")[0] == 0
    assert calls == at + 2  # the first layer was not read again, the refused command read nothing
    verify(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("seconds", [0.3, 2.0, 3.5, 5.0])
def test_ctrl_c_in_a_terminal(seconds: float, folder: Path, text: Path, tmp_path: Path) -> None:
    """A real signal to a real process, while it imports, observes, quantizes or writes."""
    out = tmp_path / "out"
    command = ["quantize", str(folder), "-o", str(out), "--budget", "3.5bpw", "--data", str(text), *SMALL]
    command += ["--samples", "100", "--batch-size", "1"]
    code = "import sys; from mopeq.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    if list(tmp_path.glob("*partial*")):
        assert process.returncode == 130
        assert b"--resume goes on" in err
        assert subprocess.run([sys.executable, "-c", code, *command, "--resume"], check=False).returncode == 0
        verify(out)
        return
    if process.returncode == 0:
        verify(out)
    elif out.exists():
        verify(out)
        assert process.returncode == 130
    else:
        assert process.returncode in (130, -signal.SIGINT)
        assert seconds < 1 or b"Traceback" not in err
