#!/usr/bin/env bash
# The quickstart's RL stage 2 (longer responses, higher temperature) on a model of 4 M parameters, on one CPU or GPU.
#
#   bash scripts/quickstart.sh       # makes the prompts and the model, then runs this and its BF16 control
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/rl.sh"

NAME=${NAME:-InfiR2_RL_FP8_tiny_stage2}
RUN_DIR=$OUTPUT_ROOT/$NAME
require HF_CHECKPOINT "Hugging Face folder of the tiny model of RL stage 1, in block FP8"
use_model tiny "$HF_CHECKPOINT"
use_precision "${PRECISION:-fp8}"

# One step is 32 prompts x 8 samples = 256 responses.
STEPS=${STEPS:-12} PROMPTS=32 SAMPLES=8 OVER_SAMPLING=32 REWARD=deepscaler-no-think
PROMPT_LENGTH=32 RESPONSE_LENGTH=95 TEMPERATURE=1.0
SEQ_LENGTH=128 MAX_TOKENS_PER_GPU=4096 RECOMPUTE=none
NODES=${NODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-1} TP=1 PP=1 CP=1 ENGINE_GPUS=1
LR=1e-4
SEED=${SEED:-1236}
SAVE_INTERVAL=10 EVAL_INTERVAL=10 EVAL_NAME=valid

require REF_LOAD "checkpoints of the tiny RL stage 1"
start_from_base "$REF_LOAD"
launch_rl "$@"
