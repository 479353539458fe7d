#!/usr/bin/env bash
# The BF16 control of InfiR2_RL_FP8_7B_stage1_1node.sh: the same prompts, numbers and seed; trainer and
# engine are both in BF16 (HF_CHECKPOINT is then a BF16 model).
set -euo pipefail
PRECISION=bf16 NAME=${NAME:-InfiR2_RL_BF16_7B_stage1_1node} exec bash "$(dirname "${BASH_SOURCE[0]}")/InfiR2_RL_FP8_7B_stage1_1node.sh" "$@"
