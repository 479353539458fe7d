#!/usr/bin/env bash
# The BF16 control of InfiR2_CPT_FP8_smollm2-135m.sh: the same data, schedule and seed; only the precision differs.
set -euo pipefail
PRECISION=bf16 NAME=${NAME:-InfiR2_CPT_BF16_smollm2-135m} exec bash "$(dirname "${BASH_SOURCE[0]}")/InfiR2_CPT_FP8_smollm2-135m.sh" "$@"
