"""Packed checkpoints: what is written, that it reads back, and that nothing damaged gets through."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import handmade
from mopeq import checkpoint
from mopeq.checkpoint import Manifest, PackedWriter, linear_precisions, read_manifest, read_packed, verify
from mopeq.checkpoint import writer as writing
from mopeq.errors import CheckpointError, MapError, OutputError
from mopeq.journal import Journal
from mopeq.precision import FULL, Precision, PrecisionMap
from mopeq.qtensor import dequantize

SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    handmade.write(out)
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what is written --------------------------------------------------------------------------------------------------


def test_bytes_are_the_golden_ones(packed: Path) -> None:
    assert files(packed) == files(handmade.GOLDEN)


def test_golden_weights_by_hand() -> None:
    """docs/format.md in Python integers and fractions, without mopeq's packing."""

    def bit_string(raw: bytes, bits: int, count: int) -> list[int]:
        number = int.from_bytes(raw, "little")
        assert len(raw) * 8 == count * bits
        return [number >> (i * bits) & ((1 << bits) - 1) for i in range(count)]

    stored = load_file(handmade.GOLDEN / SHARD)
    for name, q in handmade.matrices().items():
        (out, inp), bits, rows = q.shape, q.precision.bits, stored[f"{name}.qweight"].numpy()
        found = dequantize(read_packed(handmade.GOLDEN, name))
        if q.precision == FULL:
            halves = [
                int.from_bytes(rows[o].tobytes()[2 * i : 2 * i + 2], "little") for o in range(out) for i in range(inp)
            ]
            assert found.flatten().view(torch.int32).tolist() == [
                h << 16 if h < 1 << 15 else (h << 16) - (1 << 32) for h in halves
            ]
            continue
        groups = q.precision.group_count(inp)
        scales = stored[f"{name}.scales"].tolist()
        zeros = [[1 << (bits - 1)] * out] * groups
        if not q.precision.symmetric:
            zeros = [bit_string(r.tobytes(), bits, out) for r in stored[f"{name}.zeros"].numpy()]
        for o in (0, out // 2, out - 1):
            codes = bit_string(rows[o].tobytes(), bits, inp)
            size = inp // groups
            expected = [(c - zeros[i // size][o]) * Fraction(scales[o][i // size]) for i, c in enumerate(codes)]
            assert [Fraction(v) for v in found[o].tolist()] == expected


def test_everything_reads_back(packed: Path) -> None:
    manifest = verify(packed)
    assert manifest.precisions.experts == handmade.precisions().experts
    assert manifest.precisions.note == {"method": "by hand"}  # what is long stays in precision.json
    assert json.loads((packed / "mopeq/precision.json").read_text())["note"]["bulk"] == [1, 2]
    assert {name for name, _, _ in manifest.matrices()} == set(handmade.matrices())
    for name, q in handmade.matrices().items():
        found = read_packed(packed, name)
        assert (found.shape, found.precision, found.nbytes) == (q.shape, q.precision, q.nbytes)
        assert found.qweight.equal(q.qweight)
        assert found.scales.equal(q.scales)
        assert found.zeros is None if q.zeros is None else found.zeros.equal(q.zeros)
    for name, tensor in handmade.others().items():
        with safe_open(packed / SHARD, "pt") as stored:
            assert stored.get_tensor(name).equal(tensor)
            assert stored.get_tensor(name).dtype == tensor.dtype


def test_many_shards(tmp_path: Path, packed: Path) -> None:
    written = handmade.write(tmp_path / "out", max_shard_bytes=4096)
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 5
    assert shards[-1] == f"model-{len(shards):05}-of-{len(shards):05}.safetensors"
    assert written == sum((tmp_path / "out" / s).stat().st_size for s in shards)
    verify(tmp_path / "out")
    merged = {k: t for s in shards for k, t in load_file(tmp_path / "out" / s).items()}
    one = load_file(packed / SHARD)
    assert merged.keys() == one.keys()
    assert all(merged[k].equal(one[k]) for k in one)


def test_wide_types_are_aligned(packed: Path) -> None:
    raw = (packed / SHARD).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}[entry["dtype"]] == 0


def test_linears_take_the_largest_fitting_groups() -> None:
    found = {ref.module: p for ref, p in linear_precisions(handmade.spec(), handmade.precisions()).items()}
    assert found == {"model.layers.0.attn.q": Precision(8, 32, True), "lm_head": FULL}


def test_map_of_another_model() -> None:
    other = PrecisionMap.uniform({0: 3, 1: 2}, Precision(4, 32))
    spec = handmade.spec()
    with pytest.raises(MapError, match="for another model"):
        checkpoint.packed_config({}, spec, other, spec.inventory(0))


def test_names_must_follow_one_pattern() -> None:
    spec = handmade.spec()
    first = replace(spec.layers[0].experts[1], names={"gate": "a.1.w1", "up": "a.1.w3", "down": "a.1.w2"})
    experts = (spec.layers[0].experts[0], first, spec.layers[0].experts[2])
    odd = replace(spec, layers=(replace(spec.layers[0], experts=experts), spec.layers[1]))
    with pytest.raises(CheckpointError, match=r"expert 0\.1 stores gate as a\.1\.w1; expected"):
        checkpoint.packed_config({}, odd, handmade.precisions(), spec.inventory(416))


# --- the writer -------------------------------------------------------------------------------------------------------


def test_nothing_is_there_before_finish(tmp_path: Path) -> None:
    with PackedWriter(tmp_path / "out") as writer:
        writer.add_tensor("a", torch.ones(2))
        assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


def interrupted(out: Path, error: type[BaseException]) -> None:
    with PackedWriter(out, max_shard_bytes=1) as writer:
        writer.add_tensor("a", torch.ones(2))
        writer.add_tensor("b", torch.ones(2))
        assert [p.name for p in out.with_name("out.partial").iterdir()] == ["shard-00000"]
        raise error


@pytest.mark.parametrize("place", ["journal", "shards"])
@pytest.mark.parametrize("begun", [False, True])
def test_interruption_while_it_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool, place: str) -> None:
    """What was not there before goes, what was stays, and the last words say which."""

    def opened(resume: bool) -> None:
        with PackedWriter(tmp_path / "out", job={"of": 1}, resume=resume) as writer:
            assert writer.journal is not None
            writer.journal.record("a step")
            raise KeyboardInterrupt

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    if begun:
        with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
            opened(False)
    monkeypatch.setattr(*((Journal, "_lock") if place == "journal" else (Path, "glob")), stop)
    with pytest.raises(KeyboardInterrupt) as last:
        opened(begun)
    monkeypatch.undo()
    assert (tmp_path / "out.partial").exists() == begun
    assert ("--resume goes on" in str(last.value)) == begun


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_interruption_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        interrupted(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_written_while_the_next_one_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is in the journal when its shard is on the disk; one whose shard fails never is, nor any after it."""
    making, real, broken = threading.Event(), writing.write_tensors, tmp_path / "out.partial" / "shard-00002"

    def late(path: Path, tensors: Any) -> Any:
        assert making.wait(60), "the next one waits for this one"
        if path == broken:
            raise OSError(errno.ENOSPC, "full")
        return real(path, tensors)

    monkeypatch.setattr(writing, "write_tensors", late)
    found: list[Any] = []

    def step(writer: PackedWriter, name: str) -> list[tuple[str, Any]]:
        found.append([step for step in "abcd" if writer.journal is not None and writer.journal.done(step)])
        if name == "b":
            making.set()
        return [(name, torch.ones(8))]

    def run() -> None:
        with PackedWriter(tmp_path / "out", job={}) as writer:
            writer.behind = True
            for name in "abcd":
                writer.part(name, lambda n=name: step(writer, n), {"of": name})

    with pytest.raises(OutputError, match="the disk is full"):
        run()
    assert found == [[], [], ["a"], ["a", "b"]]
    with PackedWriter(tmp_path / "out", job={}, resume=True) as writer:
        assert writer.journal is not None
        assert [writer.journal.done(name) for name in "abcd"] == [{"of": "a"}, {"of": "b"}, None, None]


def test_empty_folder_may_be_used_and_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "a" / "out").mkdir(parents=True)
    handmade.write(tmp_path / "a" / "out")
    handmade.write(tmp_path / "b" / "c" / "out")
    assert files(tmp_path / "a" / "out") == files(tmp_path / "b" / "c" / "out")


def test_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="full exists already; give another folder"), PackedWriter(tmp_path / "full"):
        pytest.fail("entered")
    assert (tmp_path / "full" / "mine").read_text() == "precious"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError, match="exists already"), PackedWriter(tmp_path / "file"):
        pytest.fail("entered")
    (tmp_path / "busy.partial").mkdir()
    with pytest.raises(OutputError, match="another mopeq is writing it"), PackedWriter(tmp_path / "busy"):
        pytest.fail("entered")
    assert (tmp_path / "busy.partial").is_dir()


def test_too_little_space_is_seen_before_work(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"bytes free and out needs 1,000,000,000,000,000,000; free space"),
        PackedWriter(tmp_path / "out", needed_bytes=10**18),
    ):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, r"the disk is full: .* needs 5 bytes in all and [\d,]+ are free"),
                            (errno.EACCES, "cannot write .*Permission denied")]
)  # fmt: skip
def test_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    def refuse(path: Path, *parts: Any) -> dict[str, Any]:
        path.write_bytes(b"half")
        raise OSError(number, "Permission denied" if number == errno.EACCES else "No space left on device")

    monkeypatch.setattr(writing, "_write", refuse)
    with pytest.raises(OutputError, match=message):
        handmade.write(tmp_path / "out", needed_bytes=5)
    assert list(tmp_path.iterdir()) == []


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), PackedWriter(tmp_path / "file" / "out"):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        ("model.layers.1.block_sparse_moe.experts.2.w2", r"2 packed tensors are missing, .*experts\.2\.w2\.qweight"),
        ("model.norm.weight", "one is missing or left over"),
    ],
)
def test_what_is_written_must_be_what_config_says(tmp_path: Path, skipped: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        handmade.write(tmp_path / "out", without=skipped)
    assert list(tmp_path.iterdir()) == []


def added(out: Path, *tensors: tuple[str, torch.Tensor]) -> None:
    with PackedWriter(out) as writer:
        for name, tensor in tensors:
            writer.add_tensor(name, tensor)
        writer.finish(handmade.config())


def test_tensors_once_and_of_known_types(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor a was added twice"):
        added(tmp_path / "out", ("a", torch.ones(2)), ("a", torch.ones(2)))
    with pytest.raises(CheckpointError, match=r"tensor a is torch\.complex64"):
        added(tmp_path / "out", ("a", torch.ones(2, dtype=torch.complex64)))


def test_companions_are_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    with PackedWriter(tmp_path / "out") as writer:
        writer.copy_file(tmp_path / "tokenizer.json")
        with pytest.raises(OutputError, match=r"tokenizer\.json would be written twice"):
            writer.copy_file(tmp_path / "tokenizer.json")
        for name, q in handmade.matrices().items():
            writer.add(name, q)
        for name, tensor in handmade.others().items():
            writer.add_tensor(name, tensor)
        writer.finish(handmade.config())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    assert "tokenizer.json" in json.loads((tmp_path / "out/mopeq/hashes.json").read_text())["files"]
    (tmp_path / "out" / "tokenizer.json").write_text('{"a": 2}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 8 bytes and sha256"):
        verify(tmp_path / "out")


def test_files_may_be_added_beside_the_record(copy: Path) -> None:
    (copy / "mopeq" / "evaluation.json").write_text("{}")
    verify(copy)


# --- damage -----------------------------------------------------------------------------------------------------------


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        changed = change(data)
        (folder / name).write_text(json.dumps(data if changed is None else changed))

    return apply


def settings_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return edit("config.json", lambda c: change(c["quantization_config"]) and None)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change tensors; the index follows, so that only the rule under test is broken."""

    def apply(folder: Path) -> None:
        data = {k: v.clone() for k, v in load_file(folder / SHARD).items()}
        change(data)
        (folder / SHARD).unlink()
        (folder / INDEX).unlink()
        save_file(data, folder / "model.safetensors")

    return apply


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = (folder / SHARD).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        data = json.loads(raw[8 : 8 + length])
        text = change(data)
        text = json.dumps(data).encode() if text is None else text
        (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return apply


def content(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


E0 = "model.layers.0.block_sparse_moe.experts.0"
Q = "model.layers.0.attn.q"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"cannot read .*config\.json"),
    "config no json": (content("config.json", lambda b: b[:-9]),
                       r"cannot read .*config\.json: .*expected a JSON object"),
    "config no utf-8": (content("config.json", lambda b: b"\xff" + b), r"cannot read .*config\.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "is a JSON list; expected an object"),
    "config too deep": (lambda f: (f / "config.json").write_text("[" * 200_000), r"cannot read .*config\.json"),
    "not packed": (edit("config.json", lambda c: {"model_type": "olmoe"}), "this model is not packed"),
    "another method": (settings_of(lambda q: q.update(quant_method="gptq")),
                       'has quant_method \'gptq\'; expected "mopeq"'),
    "settings no object": (edit("config.json", lambda c: {"quantization_config": 3}), "not a mopeq checkpoint"),
    "newer format": (settings_of(lambda q: q.update(format_version=4)), "version 4; this mopeq reads 1, 2, 3; use"),
    "codebooks' format": (settings_of(lambda q: q.update(format_version=2)), "its precisions are those of version 1"),
    "format true": (settings_of(lambda q: q.update(format_version=True)), "format_version True"),
    "other layout": (settings_of(lambda q: q.update(layout="panels")), "layout 'panels'; this mopeq reads 'plain'"),
    "unknown key": (settings_of(lambda q: q.update(extra=1)), r"unknown keys \['extra'\]"),
    "lacking key": (settings_of(lambda q: q.pop("linears")), r"lacks \['linears'\]"),
    "map of other layers": (settings_of(lambda q: [q["map"]["experts"][g].pop("1") for g in ("gate_up", "down")]),
                            "map is for another model"),
    "map of other experts": (settings_of(lambda q: [q["map"]["experts"][g]["1"].pop() for g in ("gate_up", "down")]),
                             "map is for another model"),
    "map with odd bits": (settings_of(lambda q: q["map"]["experts"]["down"]["1"].__setitem__(0, 7)),
                          "precision of 7 bits"),
    "map malformed": (settings_of(lambda q: q.update(map={"format": "mopeq-precision", "version": 1})),
                      "malformed precision map"),
    "map null": (settings_of(lambda q: q.update(map=None)), "not a precision map"),
    "inventory edited": (settings_of(lambda q: q["inventory"]["layers"]["0"].__setitem__(0, 4)), "it was edited"),
    "inventory infinite": (settings_of(lambda q: q["inventory"].update(kept_parameters=float("inf"))),
                           "quantization_config"),
    "experts of other layers": (settings_of(lambda q: q["experts"].pop("0")),
                                r"experts has layers \[1\]; inventory has"),
    "experts malformed": (settings_of(lambda q: q["experts"]["0"].pop("names")), "malformed quantization_config"),
    "experts of equal names": (settings_of(lambda q: q["experts"]["0"].update(names=["w1", "w1", "w2"])), "malformed"),
    "experts stored twice": (settings_of(lambda q: q["experts"].__setitem__("1", q["experts"]["0"])),
                             "two matrices are stored"),
    "linear missing": (settings_of(lambda q: q["linears"].pop(Q)), "linears lists 0 matrices of attention"),
    "linear of other shape": (settings_of(lambda q: q["linears"][Q].update(shape=[32, 64])),
                              "linears lists 0 matrices"),
    "linear of other precision": (settings_of(lambda q: q["linears"][Q].update(precision="4g32s")),
                                  "the map asks for 8g32s"),
    "linear malformed": (settings_of(lambda q: q["linears"].update({Q: None})), "malformed quantization_config"),
    "linear of text shape": (settings_of(lambda q: q["linears"][Q].update(shape=["32", 32])), "malformed"),
    "no shard": (lambda f: (f / SHARD).unlink(), "model-00001-of-00001.safetensors"),
    "shard cut": (content(SHARD, lambda b: b[:-1]), "bytes; its header describes"),
    "shard longer": (content(SHARD, lambda b: b + b"\0"), "bytes; its header describes"),
    "shard of 4 bytes": (content(SHARD, lambda b: b[:4]), "is cut off or no safetensors file"),
    "shard empty": (content(SHARD, lambda b: b""), "is cut off or no safetensors file"),
    "shard a pickle": (content(SHARD, lambda b: b"\x80\x02}q\x00." + b), "is cut off or no safetensors file"),
    "header no json": (content(SHARD, lambda b: b[:8] + b"?" + b[9:]), "is no readable safetensors file"),
    "header a list": (header(lambda h: b"[]      "), "is a JSON list; expected an object"),
    "header twice": (header(lambda h: b'{"a":1,"a":1}'), "a name is there twice"),
    "unknown dtype": (header(lambda h: h[f"{E0}.w1.qweight"].update(dtype="U4")), r"experts\.0\.w1\.qweight as"),
    "negative shape": (header(lambda h: h[f"{E0}.w1.qweight"].update(shape=[-64, 8])), r"experts\.0\.w1\.qweight as"),
    "offsets of other length": (header(lambda h: h[f"{E0}.w1.qweight"].update(shape=[64, 9])),
                                r"gives .*w1\.qweight, U8"),
    "offsets overlap": (header(lambda h: h[f"{E0}.w1.qweight"].update(h[f"{E0}.w3.qweight"])), "begins at byte"),
    "no tensor entry": (header(lambda h: h.__setitem__("model.norm.weight", 3)), r"describes model\.norm\.weight as 3"),
    "index lost": (lambda f: (f / INDEX).unlink(), "neither model.safetensors.index.json nor model.safetensors"),
    "index empty": (edit(INDEX, lambda i: {"metadata": {}, "weight_map": {}}), "has no weight_map"),
    "index of numbers": (edit(INDEX, lambda i: i["weight_map"].update({"model.norm.weight": 1})), "has no weight_map"),
    "index outside": (edit(INDEX, lambda i: i["weight_map"].update({"model.norm.weight": "../x.safetensors"})),
                      "same folder"),
    "index of a lost file": (edit(INDEX, lambda i: i["weight_map"].update({"model.norm.weight": "b.safetensors"})),
                             "b.safetensors, which .* names, is missing"),
    "index lacks one": (edit(INDEX, lambda i: i["weight_map"].pop("model.norm.weight") and None), "the file holds it"),
    "index has one more": (edit(INDEX, lambda i: i["weight_map"].update(extra=SHARD)), "the file does not hold it"),
    "index of other total": (edit(INDEX, lambda i: i["metadata"].update(total_size=3)), "its files hold total_size"),
    "packed tensor lost": (tensors(lambda t: t.pop(f"{E0}.w1.scales")), r"1 packed tensors are missing.*w1\.scales"),
    "packed tensor more": (tensors(lambda t: t.update({f"{E0}.w9.qweight": torch.zeros(8, 8, dtype=torch.uint8)})),
                           r"1 packed tensors belong to nothing in the map.*w9"),
    "packed tensor cast": (tensors(lambda t: t.update({f"{E0}.w1.scales": t[f"{E0}.w1.scales"].float()})),
                           "F32.*makes it F16"),
    "packed tensor turned": (tensors(lambda t: t.update({f"{E0}.w1.zeros": t[f"{E0}.w1.zeros"].T.contiguous()})),
                             r"U8 \[16, 1\]; its precision makes it U8 \[1, 16\]"),
    "zeros of a symmetric one": (tensors(lambda t: t.update({f"{Q}.zeros": torch.zeros(1, 32, dtype=torch.uint8)})),
                                 "belong to nothing in the map"),
    "16-bit linear lost": (tensors(lambda t: t.pop("lm_head.weight")),
                           r"lm_head\.weight is absent .*expected a 16-bit matrix"),
    "16-bit linear turned": (tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.contiguous()})),
                             "16-bit matrix"),
    "other tensor lost": (tensors(lambda t: t.pop("model.norm.weight")), "384 elements; expected 416"),
    "other tensor more": (tensors(lambda t: t.update({"extra": torch.zeros(4)})), "420 elements; expected 416"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind: str, copy: Path) -> None:
    break_it, message = DAMAGE[kind]
    break_it(copy)
    with pytest.raises(CheckpointError, match=message):
        verify(copy, hashes=False)
    with pytest.raises(CheckpointError):
        verify(copy)


HASH_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights": (content(SHARD, lambda b: b[:-1] + bytes([b[-1] ^ 1])), f"{SHARD} has .* it was changed or damaged"),
    "config": (edit("config.json", lambda c: {**c, "hidden_size": 33}), r"config\.json has"),
    "record": (content("mopeq/precision.json", lambda b: b + b" "), r"mopeq/precision\.json has"),
    "no hashes": (lambda f: (f / "mopeq/hashes.json").unlink(), r"cannot read .*hashes\.json"),
    "foreign hashes": (edit("mopeq/hashes.json", lambda h: {"format": "x"}), "is not .*mopeq-hashes"),
    "hashes reformatted": (edit("mopeq/hashes.json", lambda h: h), "is not in its exact form"),
    "strange file": (lambda f: save_file({}, f / "more.safetensors"), "more.safetensors is not listed"),
    "file lost": (lambda f: (f / "mopeq/precision.json").unlink(), "listed in mopeq/hashes.json and missing"),
}


@pytest.mark.parametrize("kind", HASH_DAMAGE)
def test_hashes_prove_every_file(kind: str, copy: Path) -> None:
    break_it, message = HASH_DAMAGE[kind]
    break_it(copy)
    with pytest.raises(CheckpointError, match=message):
        verify(copy)


def test_hashes_name_no_file_outside(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    data = json.loads((copy / "mopeq/hashes.json").read_text())
    data["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (copy / "mopeq/hashes.json").write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CheckpointError, match=r"\.\./secret is listed in mopeq/hashes\.json and missing"):
        verify(copy)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no folder .*; expected a packed checkpoint"):
        verify(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no folder"):
        read_manifest(tmp_path / "file")


def test_read_packed_errors(copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no packed matrix model\.norm"):
        read_packed(copy, "model.norm")
    DAMAGE["packed tensor cast"][0](copy)
    with pytest.raises(CheckpointError, match=r"w1\.scales is .*F32"):
        read_packed(copy, f"{E0}.w1")
    (copy / "model.safetensors").unlink()
    save_file({"a": torch.ones(1)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"w1\.qweight is missing"):
        read_packed(copy, f"{E0}.w1")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_found(packed: Path, data: st.DataObject) -> None:
    """In a header, the codes, or any JSON file: a CheckpointError, never anything else."""
    name = data.draw(st.sampled_from(sorted(files(packed))))
    raw = (packed / name).read_bytes()
    head = min(len(raw), 8 + int.from_bytes(raw[:8], "little")) if name == SHARD else len(raw)
    at = data.draw(st.integers(0, head - 1) | st.integers(0, len(raw) - 1))
    flip = data.draw(st.integers(1, 255))
    (packed / name).write_bytes(raw[:at] + bytes([raw[at] ^ flip]) + raw[at + 1 :])
    try:
        with pytest.raises(CheckpointError):
            verify(packed)
        with suppress(CheckpointError):
            verify(packed, hashes=False)
    finally:
        (packed / name).write_bytes(raw)
    verify(packed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 999) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_manifest_is_understood_or_refused(data: st.DataObject) -> None:
    """One value anywhere in quantization_config replaced by any JSON: a Manifest or a CheckpointError."""
    config = handmade.config()["quantization_config"]
    at: Any = config
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(JSON)
    try:
        Manifest.from_json(config).packed_tensors()
    except CheckpointError:
        return
