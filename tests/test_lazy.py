"""Tensors read one by one are those of the mapped file, and leave nothing mapped."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mopeq.errors import ModelError
from mopeq.lazy import LINE, TYPES, Blank, Lazy
from mopeq.source import close_files, open_source, read_tensor


def test_they_are_the_mapped_ones(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    some = {
        name: (torch.randn(3, 5, generator=draw) * 9).to(dtype)
        for name, dtype in TYPES.items()
        if not name.startswith("U")
    }
    save_file({**some, "empty": torch.empty(0, 4), "one": torch.tensor(7.0)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_model("mixtral") / "config.json").read_bytes())
    source = open_source(tmp_path)
    for key in source.shapes:
        made, wanted = Lazy(source, key)[...], read_tensor(source, key)
        assert (made.dtype, made.shape) == (wanted.dtype, wanted.shape)
        blank = Blank(source, key)[...]
        assert (blank.dtype, blank.shape) == (wanted.dtype, wanted.shape)
        assert blank.untyped_storage().nbytes() == wanted.element_size()
        assert bytes(made.view(-1).view(torch.uint8)) == bytes(wanted.reshape(-1).view(torch.uint8))
        if made.numel():
            assert made.data_ptr() % LINE == wanted.data_ptr() % LINE == source.spans[key][0] % LINE


def test_nothing_stays_mapped(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    own = shutil.copytree(tiny_model("olmoe"), tmp_path / "own")  # another test may have mapped the other
    source = open_source(own)
    close_files()
    made = [Lazy(source, key)[...] for key in source.shapes]
    assert made
    assert str(source.path) not in Path("/proc/self/maps").read_text()


def test_a_file_that_has_gone_short(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = replace(open_source(tiny_model("mixtral")), path=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match=r"model.safetensors ends before '.*' does; it was whole when opened"):
        Lazy(source, next(iter(source.shapes)))[...]
