"""Opening and reading original checkpoints, and refusing damaged ones."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mopeq.adapters import describe, groups_table, inventory_of
from mopeq.errors import ModelError, MopeqError
from mopeq.precision import GROUPS
from mopeq.source import Source, open_source, read_group, read_matrix, read_tensor, stored_bytes
from mopeq.spec import WeightRef
from tiny import edit_config, rewrite, tensors

EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture
def folder(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of one file that a test may damage."""
    return Path(shutil.copytree(tiny_model("olmoe"), tmp_path / "model"))


@pytest.fixture
def sharded(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of several shards that a test may damage."""
    return Path(shutil.copytree(tiny_model("olmoe", max_shard_size="600KB"), tmp_path / "model"))


def read_all(path: Path | str) -> None:
    """Open, describe and read whatever can be read."""
    use(open_source(path))


def use(source: Source) -> None:
    spec = describe(source)
    inventory_of(source, spec)
    groups_table(spec, source)
    for layer in spec.layers:
        for group in GROUPS:
            read_group(source, layer, group)
    for ref in spec.kept:
        read_tensor(source, ref.key)


def refused(path: Path | str, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_all(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_opens_a_folder_and_reads_what_was_saved(tiny_model: Callable[..., Path]) -> None:
    source = open_source(str(tiny_model("olmoe")))
    saved = tensors(source.path)
    assert source.config["model_type"] == "olmoe"
    assert dict(source.shapes) == {k: tuple(t.shape) for k, t in saved.items()}
    assert set(source.dtypes.values()) == {"F32"}
    assert set(source.files.values()) == {"model.safetensors"}
    for key, tensor in saved.items():
        assert torch.equal(read_tensor(source, key), tensor)
        assert stored_bytes(source, key) == tensor.numel() * 4


def test_shards_read_like_one_file(tiny_model: Callable[..., Path]) -> None:
    one, many = (open_source(tiny_model("olmoe", **o)) for o in ({}, {"max_shard_size": "600KB"}))
    assert len(set(many.files.values())) > 2
    assert one.shapes == many.shapes
    assert all(torch.equal(read_tensor(one, key), read_tensor(many, key)) for key in one.shapes)


def test_stored_dtype_is_kept_and_groups_are_float32(tiny_model: Callable[..., Path]) -> None:
    source = open_source(tiny_model("olmoe", dtype=torch.bfloat16))
    layer = describe(source).layers[0]
    matrix = read_matrix(source, layer.experts[2].down)
    assert matrix.dtype == torch.bfloat16
    group = read_group(source, layer, "down")
    assert group.dtype == torch.float32
    assert torch.equal(group[2], matrix.float())


def test_a_group_stacks_gate_rows_then_up_rows(tiny_model: Callable[..., Path]) -> None:
    source = open_source(tiny_model("olmoe"))
    layer, saved = describe(source).layers[1], tensors(source.path)
    gate_up, down = (read_group(source, layer, group) for group in GROUPS)
    assert gate_up.shape == (8, 256, 64)
    assert down.shape == (8, 64, 128)
    assert torch.equal(gate_up[5, 128:], saved[EXPERT])
    assert torch.equal(gate_up[3, :128], saved["model.layers.1.mlp.experts.3.gate_proj.weight"])
    assert torch.equal(down[7], saved["model.layers.1.mlp.experts.7.down_proj.weight"])


def test_slices_of_a_fused_tensor(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4, 10)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = open_source(tmp_path)
    assert torch.equal(read_matrix(source, WeightRef("w", (4, 10), 1)), tensor[1])
    assert torch.equal(read_matrix(source, WeightRef("w", (2, 10), 2, rows=(2, 4, 1))), tensor[2, 2:])
    assert torch.equal(read_matrix(source, WeightRef("w", (5, 4), 0, True, (1, 10, 2))), tensor[0].T[1::2])


def test_weights_are_mapped_not_copied(tiny_model: Callable[..., Path]) -> None:
    source = open_source(tiny_model("olmoe"))
    one, two = (read_tensor(source, EXPERT) for _ in range(2))
    assert one.data_ptr() == two.data_ptr()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(
    tiny_model: Callable[..., Path], tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    per_expert = Path(shutil.copytree(tiny_model("olmoe", dtype=dtype), tmp_path / "a"))
    bad = tensors(per_expert)[EXPERT].clone()
    bad[3, 4] = value
    rewrite(per_expert, {EXPERT: bad})
    refused(per_expert, EXPERT, "1 of 8192 weights", "NaN or infinite")

    fused = Path(shutil.copytree(tiny_model("olmoe", dtype=dtype, hub_layout=False), tmp_path / "b"))
    bad = tensors(fused)[FUSED].clone()
    bad[6, :2] = value
    rewrite(fused, {FUSED: bad})
    refused(fused, f"{FUSED}, expert 6", "128 of 8192 weights")
    source = open_source(fused)
    expert = describe(source).layers[1].experts[6]
    assert torch.isfinite(read_matrix(source, expert.up)).all()
    with pytest.raises(ModelError, match="expert 6"):
        read_matrix(source, expert.gate)


def test_a_float64_weight_too_large_for_float32_is_refused(folder: Path) -> None:
    rewrite(folder, {EXPERT: tensors(folder)[EXPERT].double() * 1e300})
    refused(folder, EXPERT, "infinite")


# --- folders that are not models


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "missing", "no folder", "expected a model folder or a Hugging Face id")
    refused(str(tmp_path / "missing"), "no folder")
    refused("./missing", "no folder")
    refused("a/b/c", "no folder")
    refused("", "no folder" if not Path().is_dir() else "config.json")
    refused("x" * 5000, "cannot be a folder")
    refused("a\0b", "expected a")


def test_a_hub_id_offline() -> None:
    refused("nobody/no-such-model", "nobody/no-such-model", "HF_HUB_OFFLINE", "give a folder")


def test_a_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    def fail(*_: object, **__: object) -> str:
        raise ConnectionResetError("connection reset\nby peer")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("nobody/no-such-model", "could not be fetched", "connection reset", "check the name")


def test_a_hub_id_in_the_cache(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> None:
    import huggingface_hub

    asked: list[tuple[Any, ...]] = []

    def cached(name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tiny_model("olmoe"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    source = open_source("nobody/tiny", revision="v1")
    assert source.path == tiny_model("olmoe")
    assert [a[:2] for a in asked] == [("nobody/tiny", "v1")] * 2
    assert asked[0][2] == ["config.json"]


def test_a_refused_hub_model_is_not_downloaded(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import huggingface_hub

    edit_config(folder, quantization_config={"quant_method": "fp8"})
    calls: list[object] = []

    def cached(name: str, allow_patterns: list[str], **_: object) -> str:
        calls.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    refused("nobody/tiny", "already quantized (fp8)")
    assert calls == [["config.json"]]


def test_a_file_is_not_a_folder(folder: Path) -> None:
    refused(folder / "model.safetensors", "is a file", "expected a model folder")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json", "the folder is empty")


@pytest.mark.parametrize(
    ("name", "words"),
    [("pytorch_model.bin", "PyTorch pickles"), ("model-Q4_K_M.gguf", "GGUF"), ("consolidated.00.pth", "pickles")],
)
def test_other_formats(folder: Path, name: str, words: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, "no safetensors files", name, words)
    (folder / "config.json").unlink()
    refused(folder, "no config.json", name, words)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no safetensors files", "expected model.safetensors")


@pytest.mark.parametrize("text", ["", "{", "\xff\xfe", "nonsense", "[" * 100_000])
def test_config_is_not_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, "config.json", "not readable JSON")


@pytest.mark.parametrize("text", ["[]", "null", "3", '"olmoe"'])
def test_config_is_not_an_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", "expected a JSON object")


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"quant_method": "mopeq"}, "already packed by mopeq"),
        ({"quant_method": "mxfp4"}, "already quantized (mxfp4)"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "bfloat16 checkpoint"),
        ({"bits": 4}, "already quantized"),
        ("odd", "already quantized"),
    ],
)
@pytest.mark.parametrize("entry", ["quantization_config", "compression_config"])
def test_quantized_already(folder: Path, settings_: object, words: str, entry: str) -> None:
    edit_config(folder, **{entry: settings_})
    refused(folder, words)
    edit_config(folder, **{entry: None, "text_config": {entry: settings_}})
    refused(folder, words)


# --- shards


def test_a_missing_shard_is_named(sharded: Path) -> None:
    first, *_ = sorted(sharded.glob("model-*.safetensors"))
    first.unlink()
    refused(sharded, "1 of", "shards are missing", first.name)


def test_a_missing_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    refused(sharded, "no model.safetensors.index.json", "download the index")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, "no weight_map")


def edit_index(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_an_index_that_leaves_the_folder(sharded: Path) -> None:
    edit_index(sharded, lambda names: names.update({EXPERT: "../other/model-00001-of-00002.safetensors"}))
    refused(sharded, "names of files beside it")


def test_an_index_naming_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    edit_index(sharded, lambda names: names.update({"model.extra.weight": sorted(names.values())[0]}))
    refused(sharded, "lacks tensor 'model.extra.weight'", "index")


def test_a_tensor_that_the_index_does_not_name(sharded: Path) -> None:
    edit_index(sharded, lambda names: names.pop(EXPERT) and None)
    refused(sharded, "holds", EXPERT, "does not name")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    holder = open_source(sharded).files[EXPERT]
    other = next(f for f in sorted(sharded.glob("model-*.safetensors")) if f.name != holder)
    from safetensors.torch import load_file

    save_file({**load_file(other), EXPERT: tensors(sharded)[EXPERT].clone()}, other)
    refused(sharded, EXPERT, "is in both", holder, other.name)


def test_one_file_beside_an_index_of_others(sharded: Path) -> None:
    shutil.copy(next(sharded.glob("model-*.safetensors")), sharded / "model.safetensors")
    refused(sharded, "has both", "remove the one")


# --- damaged safetensors files


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1, -4096])
def test_a_truncated_file(folder: Path, length: int) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:length])
    refused(folder, "model.safetensors", "truncated", "download it again")


def test_bytes_after_the_end(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"tail")
    refused(folder, "bytes after its last tensor")


def with_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header in place of the old one, the data unchanged."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h[EXPERT].update(dtype="Q3"), "dtype 'Q3'"),
        (lambda h: h[EXPERT].update(shape=[127, 64]), "is given bytes"),
        (lambda h: h[EXPERT].update(shape=[-128, -64]), "not a dtype, a shape and two offsets"),
        (lambda h: h[EXPERT].update(shape=[128.0, 64]), "not a dtype"),
        (lambda h: h[EXPERT].pop("dtype") and None, "not a dtype"),
        (lambda h: h.update({EXPERT: None}), "not a dtype"),
        (lambda h: h[EXPERT].update(data_offsets=[0, 128 * 64 * 4]), "begins at byte"),
        (lambda h: h.pop(EXPERT) and None, "begins at byte"),
        (lambda _: [1], "not a JSON object"),
        (
            lambda h: h.update({"a\nb": {**h[EXPERT], "shape": [0], "data_offsets": [0, 0]}}),
            r"'a\nb' has control characters",
        ),
    ],
)
def test_a_header_that_contradicts_itself(folder: Path, change: Callable[[Any], object], words: str) -> None:
    with_header(folder, change)
    refused(folder, words, "download it again")


def test_a_tensor_named_twice(folder: Path) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].rstrip()
    entry = b',"lm_head.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    text = header[:-1] + entry
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    refused(folder, "'lm_head.weight' twice")


def test_an_unknown_tensor(tiny_model: Callable[..., Path]) -> None:
    source = open_source(tiny_model("olmoe"))
    with pytest.raises(ModelError, match="no tensor 'x'"):
        read_tensor(source, "x")


def test_a_file_that_vanishes_after_opening(folder: Path) -> None:
    source = open_source(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        read_tensor(source, EXPERT)


# --- any damage is one of our errors

ANY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def survives(verb: Callable[[Any], None], subject: Any) -> None:
    """The verb works or raises one of our errors, a line long; anything else fails the test."""
    message = "fine"
    try:
        verb(subject)
    except MopeqError as error:
        message = str(error)
    assert message
    assert "\n" not in message


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_tiny

    changes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_experts": 2, "vocab_size": 8}
    return save_tiny("olmoe", tmp_path_factory.mktemp("small"), pad_token_id=None, **changes)


@ANY
@given(st.data())
def test_mutated_weights_never_surprise(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray((small / "model.safetensors").read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, end - 1) | st.integers(0, 9))
        raw[where] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)) | st.none())
    target = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    shutil.copytree(small, target)
    (target / "model.safetensors").write_bytes(raw[:cut])
    survives(read_all, target)


@ANY
@given(st.data())
def test_mutated_headers_never_surprise(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    target = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    shutil.copytree(small, target)

    def change(header: dict[str, Any]) -> None:
        entry = header[data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        choices = {"dtype": st.sampled_from(["BF16", "F16", "I32", "U32", "F64", "F8_E4M3", "F4", "X"]) | JSON}
        entry[field] = data.draw(choices.get(field, st.lists(st.integers(-1, 64), max_size=3) | JSON))

    with_header(target, change)
    survives(read_all, target)


@ANY
@given(st.data())
def test_mutated_configurations_never_surprise(small: Path, data: st.DataObject) -> None:
    source = open_source(small)
    config = dict(source.config)
    for _ in range(data.draw(st.integers(1, 2))):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(JSON | st.integers(0, 9))
    survives(use, Source(source.path, config, source.shapes, source.dtypes, source.files))


@ANY
@given(st.data())
def test_mutated_indices_never_surprise(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    target = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    shutil.copytree(small, target)
    names: dict[str, Any] = dict.fromkeys(open_source(small).shapes, "model.safetensors")
    names[data.draw(st.sampled_from(sorted(names)) | st.text())] = data.draw(JSON | st.text())
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    survives(read_all, target)
