"""Builds ``libmopeq_cpu`` with the machine's C++ compiler when the package is built, or goes on without it.

Without a compiler the package is pure Python and mopeq runs on torch alone (``mopeq.kernels.selected()`` says so).
``CXX`` names the compiler, ``CXXFLAGS`` adds flags, ``MOPEQ_BUILD`` is ``auto`` (default), ``require`` (a failure ends
the build) or ``skip``. ``python hatch_build.py`` builds in place, for work on a checkout.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

KERNELS = Path("src") / "mopeq" / "kernels"
LIBRARY = "libmopeq_cpu.so"
COMMON = ("linear", "attention", "experts", "routing", "product", "threads", "repack", "fill", "grids", "portable")
X86 = {"avx2": "-mavx2 -mfma -mf16c", "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512vnni"}
ARM = {"neon": "-march=armv8.2-a+dotprod"}
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off"


def compile_library(root: Path) -> Path:
    """Compile ``csrc`` into the library beside it; :class:`RuntimeError` or :class:`OSError` says why not."""
    source, target = root / KERNELS / "csrc", root / KERNELS / LIBRARY
    compiler = shlex.split(os.environ.get("CXX") or "") or [shutil.which("c++") or shutil.which("g++") or "clang++"]
    flags = [*shlex.split(FLAGS), *shlex.split(os.environ.get("CXXFLAGS") or "")]
    units = dict.fromkeys(COMMON, "")
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags.append("-DMOPEQ_X86")
        units |= X86
    elif platform.machine().lower() in ("aarch64", "arm64"):
        flags.append("-DMOPEQ_ARM")
        units |= ARM
    with tempfile.TemporaryDirectory() as scratch:
        commands = [
            [*compiler, *flags, *more.split(), "-c", str(source / f"{name}.cpp"), "-o", f"{scratch}/{name}.o"]
            for name, more in units.items()
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        made = f"{scratch}/{LIBRARY}"
        link = [*compiler, *flags, "-shared", "-o", made, *(f"{scratch}/{name}.o" for name in units)]
        _run([*link, *([] if sys.platform == "darwin" else ["-lpthread"])])
        beside = target.with_name(f"{LIBRARY}.partial")
        shutil.copyfile(made, beside)
        beside.replace(target)  # a process that has the old one mapped keeps it
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {(done.stderr or done.stdout).strip()[-2000:]}")


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script
    pass
else:

    class CpuKernels(BuildHookInterface):  # type: ignore[type-arg]
        """Adds the library to wheels and editable installs, and their tag."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Compile, and say in the build's output where that was not possible."""
            choice = os.environ.get("MOPEQ_BUILD", "auto")
            if self.target_name != "wheel" or choice == "skip":
                return
            if os.name == "nt" and choice == "auto":
                return
            try:
                target = compile_library(Path(self.root))
            except (OSError, RuntimeError) as error:
                if choice == "require":
                    raise
                (Path(self.root) / KERNELS / LIBRARY).unlink(missing_ok=True)  # it may be of other sources
                self.app.display_warning(f"mopeq is built without its CPU kernels and will run on torch: {error}")
                return
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["artifacts"].append(f"/{target.relative_to(self.root).as_posix()}")


if __name__ == "__main__":
    print(compile_library(Path(__file__).resolve().parent))
