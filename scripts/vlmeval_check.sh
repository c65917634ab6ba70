#!/bin/sh
# mopeq in the real VLMEvalKit, in a virtual environment of its own that takes torch and transformers from PYTHON's: the
# toolkit names some seventy packages, of which the part that asks and scores needs these.
# Usage: scripts/vlmeval_check.sh PYTHON [PYTEST ARGUMENT...]
# The environment goes to .vlmeval/, or to $VLMEVAL_ENV, and is kept: a second run installs mopeq alone.
set -eu
base=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
env=${VLMEVAL_ENV:-$root/.vlmeval}
[ -x "$env/bin/python" ] || "$base" -m venv "$env"
version=0.0.20
if [ "$("$env/bin/python" -m pip freeze | grep '^ms-vlmeval==')" != "ms-vlmeval==$version" ]; then
    "$base" -c 'import site; print(site.getsitepackages()[0])' > "$env/$("$env/bin/python" -c \
        'import sys; print(f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/base.pth")')"
    # --no-deps, so that none brings a torch of its own; torchvision's operators may be for another, which does not matter
    "$env/bin/python" -m pip install --quiet --no-deps antlr4-python3-runtime==4.11.1 decord et_xmlfile imageio jieba \
        json_repair latex2sympy2-extended levenshtein math-verify num2words opencv-python-headless openpyxl pylatexenc \
        qwen_vl_utils rapidfuzz rouge sty termcolor timeout-decorator torchvision validators xlsxwriter \
        "ms-vlmeval==$version"
fi
"$env/bin/python" -m pip install --quiet --no-deps --editable "$root"
cd "$root"
HF_HUB_OFFLINE=1 exec "$env/bin/python" -m pytest -p no:cacheprovider tests/evaluate/test_vlmevalkit.py tests/serve/test_vlmevalkit_served.py "$@"
