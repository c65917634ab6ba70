"""The compiled library, ``libmopeq_cpu``: whether it is here, loaded once, and its calls for packing (docs/kernels.md).

It is below everything that has a fast path in it: bit strings, quantizers and kernels.
"""

from __future__ import annotations

import ctypes
import os
import platform
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from mopeq.errors import InputError

__all__ = ["ABI", "ISAS", "LIBRARY", "TYPES", "VALUE", "check", "isa", "library", "why_not"]

LIBRARY = Path(__file__).parent / "kernels" / "libmopeq_cpu.so"
ABI = 9
ISAS = ("portable", "neon") if platform.machine() in ("aarch64", "arm64") else ("portable", "avx2", "avx512")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the types that it takes."""
VALUE = 10
"""What a call returns for weights that are not finite, or too large."""
FAULTS = {
    1: "a buffer is missing",
    2: "rows, inputs or outputs do not fit together",
    3: "a width is not 2, 3, 4, 5, 6, 8 or 16 bits, or a codebook is not of 2",
    4: "a group size is no multiple of 32 or does not divide the inputs",
    5: "a matrix lies outside its buffer",
    6: "offsets decrease or exceed the rows",
    7: "a buffer is not aligned to its elements",
    8: "there is no memory for the activations",
    9: "the activations' type or number of digits is unknown",
    VALUE: "a number is not finite, or too large",
    11: "a file cannot be read, or ends early",
}


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none. ``MOPEQ_CPU_ISA`` forces one of :data:`ISAS`."""
    if not LIBRARY.exists():
        return None, f"{LIBRARY.name} was not built when mopeq was installed; install it with a C++ compiler at hand"
    try:
        lib = ctypes.CDLL(str(LIBRARY))
        abi = lib.mopeq_abi()
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} does not load: {error}"
    if abi != ABI:
        return None, f"{LIBRARY.name} has interface {abi}, this mopeq expects {ABI}; install mopeq again"
    for name in ("grouped_linear", "experts", "attention", "moe", "grids"):
        getattr(lib, f"mopeq_{name}").argtypes = [c_void_p]  # a job by reference; by value it is refused
    lib.mopeq_fill.argtypes = [c_void_p, c_int64, c_int64]
    lib.mopeq_pack_bits.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64]
    lib.mopeq_repack_codes.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64]
    lib.mopeq_repack_scales.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64]
    lib.mopeq_repack_zeros.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64]
    lib.mopeq_read.argtypes, lib.mopeq_read.restype = [c_void_p, c_int64, c_int64], ctypes.c_uint64
    lib.mopeq_set_parallel_for.argtypes = [c_void_p]
    lib.mopeq_set_parallel_for.restype = None
    lib.mopeq_set_parallel_for(_torch_pool())
    forced = os.environ.get("MOPEQ_CPU_ISA")
    if forced and (forced not in ISAS or lib.mopeq_use_isa(c_int(ISAS.index(forced)))):
        best = ISAS[: lib.mopeq_best_isa() + 1]
        raise InputError(f"MOPEQ_CPU_ISA is {forced}; expected one of {', '.join(best)} on this machine")
    return lib, ""


def _torch_pool() -> int | None:
    """Address of ``torch_parallel_for``, by which the library works on torch's threads; None where torch has none."""
    folder = Path(torch.__file__).with_name("lib")
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            found = getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
            return None if found is None else ctypes.cast(found, c_void_p).value
    return None


def library() -> ctypes.CDLL:
    """The library; :class:`InputError` where there is none."""
    lib, reason = _open()
    if lib is None:
        raise InputError(f"mopeq has no compiled CPU kernel: {reason}")
    return lib


def why_not() -> str:
    """Why there is no compiled kernel; empty where there is one."""
    return _open()[1]


def isa() -> str:
    """The instruction set in use."""
    return ISAS[library().mopeq_isa()]


def check(code: int) -> None:
    """Raise :class:`InputError` for what a call returned, unless that is 0."""
    if code:
        raise InputError(f"the CPU kernel refuses its arguments: {FAULTS.get(code, f'fault {code}')}")
