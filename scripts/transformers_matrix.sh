#!/bin/sh
# The tests of the transformers integration against several versions of transformers, each in a virtual environment of its
# own that lies over the development one: torch and the tools come from there, transformers and mopeq are installed anew.
# Usage: scripts/transformers_matrix.sh PYTHON [VERSION...]     PYTHON: of an environment with mopeq's dev extra
# The newest version is asked for as "newest". Environments go to .matrix/, or to $MATRIX.
set -eu
base=$1
shift
[ $# -gt 0 ] || set -- 5.17.0 5.19.0 newest
root=$(cd "$(dirname "$0")/.." && pwd)
under=$("$base" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
failed=""
for version; do
    env=${MATRIX:-$root/.matrix}/$version
    [ -x "$env/bin/python" ] || "$base" -m venv "$env"
    echo "import site; site.addsitedir('$under')" > "$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/zz_base.pth"
    want="transformers==$version"
    [ "$version" != newest ] || want="transformers<6"
    "$env/bin/python" -m pip install --quiet --upgrade "$want"
    "$env/bin/python" -m pip install --quiet --no-deps --editable "$root"
    found=$("$env/bin/python" -c 'import transformers; print(transformers.__version__)')
    echo "== transformers $found"
    (cd "$root" && HF_HUB_OFFLINE=1 "$env/bin/python" -m pytest -o addopts= -q -p no:cacheprovider tests/integrations tests/test_load.py tests/test_autoload.py tests/test_import.py) ||
        failed="$failed $found"
done
[ -z "$failed" ] || { echo "failed with transformers$failed"; exit 1; }
