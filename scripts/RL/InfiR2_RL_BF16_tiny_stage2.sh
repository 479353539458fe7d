#!/usr/bin/env bash
# The BF16 control of InfiR2_RL_FP8_tiny_stage2.sh: the same prompts, numbers and seed; trainer and engine are in BF16.
set -euo pipefail
PRECISION=bf16 NAME=${NAME:-InfiR2_RL_BF16_tiny_stage2} exec bash "$(dirname "${BASH_SOURCE[0]}")/InfiR2_RL_FP8_tiny_stage2.sh" "$@"
