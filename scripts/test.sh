#!/usr/bin/env bash
# Set up, then run every check: ruff, shellcheck, tests. What CI runs.
#
#   bash scripts/test.sh            # CPU, about 11 minutes on 2 cores
#   bash scripts/test.sh --gpu      # also tests/gpu, which need a Hopper GPU
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/setup.sh"

set_up
cd "$REPO_ROOT"
make check PYTHON="$PYTHON"
if [[ ${1:-} == --gpu ]]; then "$PYTHON" -m pytest -o addopts="-q --strict-markers" tests/gpu; fi
