#!/bin/sh
# Exports against the runtimes they are for, in virtual environments of their own: llama.cpp is compiled, AutoRound and
# vLLM ask for versions that are not the development ones. Usage: scripts/export_check.sh PYTHON DEVELOPMENT_PYTHON
# The environments go to .llama/, .auto-round/ and .vllm/, or to $LLAMA_ENV, $AUTO_ROUND_ENV and $VLLM_ENV, and are kept.
# .vllm/ is that of scripts/vllm_check.sh; vLLM is left out where it is not there.
set -eu
base=$1
development=$2
root=$(cd "$(dirname "$0")/.." && pwd)
llama=${LLAMA_ENV:-$root/.llama}
auto_round=${AUTO_ROUND_ENV:-$root/.auto-round}
vllm=${VLLM_ENV:-$root/.vllm}
installed() { [ -x "$1/bin/python" ] && "$1/bin/python" -m pip freeze | grep -qi "^$2\$"; }
if ! installed "$llama" llama_cpp_python==0.3.36; then
    "$base" -m venv "$llama"
    CMAKE_ARGS="-DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF" "$llama/bin/python" -m pip install --quiet llama-cpp-python==0.3.36
fi
if ! installed "$auto_round" auto-round==0.16.1; then
    "$base" -m venv "$auto_round"
    "$auto_round/bin/python" -m pip install --quiet -c "$root/constraints.txt" auto-round==0.16.1 transformers torch
fi
[ -x "$vllm/bin/python" ] && export MOPEQ_VLLM="$vllm/bin/python"
export MOPEQ_LLAMA_CPP="$llama/bin/python" MOPEQ_AUTO_ROUND="$auto_round/bin/python" HF_HUB_OFFLINE=1
cd "$root"
exec "$development" -m pytest -p no:cacheprovider tests/export/test_consumers.py
