"""Whether the mopeq that Python finds runs the kernel that is expected, and computes what the reference does.

python scripts/check_kernel.py cpu|naive [FOLDER]      # FOLDER: where mopeq must have come from
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import mopeq
from mopeq.cli import main as command
from mopeq.data.samples import bundled_model
from mopeq.kernels import selected, using


def main() -> None:
    """Exit code 0, or a sentence."""
    kernel, folder = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "/").resolve()
    if folder not in Path(mopeq.__file__).resolve().parents:
        raise SystemExit(f"mopeq came from {mopeq.__file__}, expected {folder}")
    found = selected()
    if found.name != kernel:
        raise SystemExit(f"the kernel is {found.name} ({found.reason}), expected {kernel}")
    with tempfile.TemporaryDirectory() as folder_of_model:
        packed = Path(folder_of_model) / "packed"
        flags = ["--uniform", "3", "--method", "rtn", "--no-eval"]
        if command(["quantize", str(bundled_model()), "-o", str(packed), *flags]):
            raise SystemExit("mopeq quantize failed")
        model = mopeq.load(packed, dtype=torch.float32)
    ids = torch.arange(2, 66).view(1, -1)
    with torch.no_grad():
        got = model(ids).logits
        with using("naive"):
            want = model(ids).logits
    error = float((got - want).norm() / want.norm())
    if not error < 1e-3:
        raise SystemExit(f"logits differ from the reference by {error:.2g} of their norm, expected below 1e-3")
    print(f"mopeq {mopeq.__version__} from {folder}: kernel {found.name} {found.isa}, error {error:.1e}")


if __name__ == "__main__":
    main()
