"""Reading ahead reads the tensors' own bytes, and ends when it is told to."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mopeq import ahead as module
from mopeq.ahead import Ahead
from mopeq.source import open_source, read_tensor, stored_bytes


def test_all_bytes_of_the_tensors_are_read(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1000)
    source = open_source(tiny_model("mixtral", max_shard_size="100KB"))
    keys = [key for key in source.shapes if ".experts." in key]
    ahead = Ahead(source)
    ahead.begin(keys)
    ahead.end(wait=True)
    assert ahead.read == sum(stored_bytes(source, key) for key in keys)
    assert len({source.files[key] for key in keys}) > 1
    key = keys[5]
    begin, end = source.spans[key]
    assert (source.path / source.files[key]).read_bytes()[begin:end] == read_tensor(source, key).numpy().tobytes()


def test_a_file_that_has_gone_short_ends_it(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("mixtral")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    source = open_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    ahead = Ahead(source)
    ahead.begin(list(source.shapes))
    ahead.end(wait=True)
    assert ahead.read == 0
