#!/usr/bin/env bash
# The BF16 control of InfiR2_CPT_FP8_1.5B_decay.sh: a branch of the BF16 run.
set -euo pipefail
PRECISION=bf16 PARENT=${PARENT:-InfiR2_CPT_BF16_1.5B} exec bash "$(dirname "${BASH_SOURCE[0]}")/InfiR2_CPT_FP8_1.5B_decay.sh" "$@"
