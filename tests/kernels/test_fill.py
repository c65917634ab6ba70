"""Reading straight into panels against reading and then converting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mopeq.errors import InputError
from mopeq.kernels import GroupLayout, PackedGroup, convert, selected
from mopeq.kernels.fill import CODES, PLAIN, POINTS, SCALES, Stored, fill
from mopeq.kernels.layout import PARTS
from mopeq.precision import Precision

pytestmark = pytest.mark.skipif(selected().name != "cpu", reason="no compiled kernel")
ROWS = (8, 16, 24, 2064)  # a last panel of 8 rows; more rows than are read at a time
KINDS = [Precision(b, g, s) for b in (2, 3, 4, 5, 6, 8) for g, s in ((32, False), (64, True))]
KINDS += [Precision(2, 32, codebook=True), Precision(3, 64, hadamard=True)]


def random_group(precision: Precision, rows: int, inputs: int = 256) -> PackedGroup:
    layout = GroupLayout((precision,), ((rows, inputs),))
    made: dict[str, Tensor | None] = {}
    for part, dtype in PARTS.items():
        size = layout.size(part)
        bits = torch.randint(0, 256, (size * (2 if dtype == torch.float16 else 1),), dtype=torch.uint8)
        made[part] = bits.view(dtype) if size else None
    assert made["qweight"] is not None
    return PackedGroup(layout, made["qweight"], made["scales"], made["zeros"])


def written(group: PackedGroup, file: Path) -> tuple[list[Stored], dict[str, Tensor]]:
    """The group's parts in a file, and where they are to go."""
    jobs, to, at = [], {}, 7
    precision, (rows, inputs) = group.layout.precisions[0], group.layout.shapes[0]
    columns = {"qweight": inputs // precision.weights_per_code, "scales": inputs // precision.group_size}
    data = b"ignored"
    for part, kind in (("qweight", CODES), ("scales", SCALES), ("zeros", POINTS)):
        tensor = getattr(group, part)
        if tensor is None:
            continue
        raw = tensor.view(torch.uint8).numpy().tobytes()
        to[part] = torch.zeros_like(tensor)
        many = columns.get(part, columns["scales"])
        jobs.append(Stored(file, at, at + len(raw), to[part].data_ptr(), kind, rows, many, precision.code_bits))
        data, at = data + raw, at + len(raw)
    file.write_bytes(data)
    return jobs, to


@pytest.mark.parametrize("precision", KINDS, ids=str)
def test_equals_converting(precision: Precision, tmp_path: Path) -> None:
    for rows in ROWS:
        group = random_group(precision, rows)
        jobs, to = written(group, tmp_path / "file")
        for threads in (1, 3):
            for tensor in to.values():
                tensor.zero_()
            fill(jobs, threads)
            copies = [None if t is None else t.clone() for t in (group.qweight, group.scales, group.zeros)]
            panels = convert(PackedGroup(group.layout, *copies), "panels")
            for part, tensor in to.items():
                assert tensor.view(torch.uint8).equal(getattr(panels, part).view(torch.uint8)), (part, rows)


def test_bytes_as_they_are(tmp_path: Path) -> None:
    file, to = tmp_path / "file", torch.zeros(1000, dtype=torch.uint8)
    file.write_bytes(bytes(range(250)) * 5)
    fill([Stored(file, 100, 1100, to.data_ptr())], 2)
    assert to.tolist() == [n % 250 for n in range(100, 1100)]
    fill([], 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end": 10_000}, "outside its buffer"),
        ({"part": PLAIN, "begin": 500, "end": 10_000}, "ends early"),
        ({"begin": -1}, "outside its buffer"),
        ({"end": 7}, "outside its buffer"),
        ({"to": 0}, "a buffer is missing"),
        ({"rows": 12}, "do not fit together"),
        ({"rows": -8}, "do not fit together"),
        ({"rows": 1 << 31}, "do not fit together"),
        ({"columns": 100}, "do not fit together"),
        ({"columns": 0}, "do not fit together"),
        ({"columns": (1 << 31) - 32, "rows": (1 << 31) - 8}, "outside its buffer"),
        ({"bits": 7}, "a width is not"),
        ({"bits": 0}, "a width is not"),
        ({"part": 4}, "unknown"),
        ({"part": -1}, "unknown"),
    ],
)
def test_refuses(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    """What does not fit is refused before anything is written; a file that ends early is found while reading."""
    jobs, to = written(random_group(Precision(3, 32), 16), tmp_path / "file")
    with pytest.raises(InputError, match=message):
        fill([replace(jobs[0], **changes), *jobs[1:]], 1)
    assert message == "ends early" or not any(tensor.any() for tensor in to.values())


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fill([Stored(tmp_path / "nothing", 0, 1, 1)], 1)
