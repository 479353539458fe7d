#!/usr/bin/env bash
# RL stage 1 (short responses: sums of three and four numbers) of the quickstart's model of 0.9 M parameters, on one CPU
# or GPU. scripts/quickstart.sh makes its prompts and the model that it starts from, and runs it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/rl.sh"

NAME=${NAME:-InfiR2_RL_FP8_tiny_stage1}
RUN_DIR=$OUTPUT_ROOT/$NAME
require HF_CHECKPOINT "Hugging Face folder of the tiny model of SFT stage 2, in block FP8"
use_model tiny "$HF_CHECKPOINT"
use_precision "${PRECISION:-fp8}"

# One step is 16 prompts x 8 samples = 128 responses, of 32 prompts' that are asked at a time.
STEPS=${STEPS:-7} PROMPTS=16 SAMPLES=8 OVER_SAMPLING=32 REWARD=deepscaler-no-think
PROMPT_LENGTH=48 RESPONSE_LENGTH=144 TEMPERATURE=1.0
SEQ_LENGTH=256 MAX_TOKENS_PER_GPU=4096 RECOMPUTE=none
NODES=${NODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-1} TP=1 PP=1 CP=1 ENGINE_GPUS=1
LR=5e-5
SEED=${SEED:-1236}
SAVE_INTERVAL=7 EVAL_INTERVAL=7 EVAL_NAME=valid

require REF_LOAD "checkpoints of the tiny SFT stage 2"
start_from_base "$REF_LOAD"
launch_rl "$@"
