#!/usr/bin/env bash
# The BF16 control of InfiR2_SFT_FP8_smollm2-135m_stage2.sh: the same data, schedule and seed; only the precision differs.
set -euo pipefail
PRECISION=bf16 NAME=${NAME:-InfiR2_SFT_BF16_smollm2-135m_stage2} exec bash "$(dirname "${BASH_SOURCE[0]}")/InfiR2_SFT_FP8_smollm2-135m_stage2.sh" "$@"
