#!/usr/bin/env bash
# The BF16 control of InfiR2_CPT_FP8_7B.sh: the same data, schedule, parallelism and seed; only the precision differs.
set -euo pipefail
PRECISION=bf16 NAME=${NAME:-InfiR2_CPT_BF16_7B} exec bash "$(dirname "${BASH_SOURCE[0]}")/InfiR2_CPT_FP8_7B.sh" "$@"
