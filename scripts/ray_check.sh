#!/bin/sh
# --ray on a real Ray cluster of several node processes, in a virtual environment of its own: Ray is large, and few need it.
# Usage: scripts/ray_check.sh PYTHON [PYTEST ARGUMENT...]
# The environment goes to .ray/, or to $RAY_ENV, and is kept.
set -eu
base=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
env=${RAY_ENV:-$root/.ray}
[ -x "$env/bin/python" ] || "$base" -m venv "$env"
cd "$root"
"$env/bin/python" -m pip install --quiet -c constraints.txt torch
"$env/bin/python" -m pip install --quiet -c constraints.txt --editable '.[ray]' "pytest>=8.3" "pytest-timeout>=2.3"
# the cluster here tells nobody that it is used, and has one thread a process
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
exec "$env/bin/python" -m pytest -p no:cacheprovider tests/integrations/test_ray.py "$@"
