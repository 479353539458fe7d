#!/usr/bin/env bash
# SFT stage 2 (harder, longer problems) of SmolLM2-135M in the quickstart, on one GPU.
#
#   MODEL=smollm2-135m bash scripts/quickstart.sh       # makes the data, then runs this and its BF16 control
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/sft.sh"

NAME=${NAME:-InfiR2_SFT_FP8_smollm2-135m_stage2}
RUN_DIR=$OUTPUT_ROOT/$NAME
require HF_CHECKPOINT "Hugging Face folder of the base model: shape and tokenizer"
use_model smollm2-135m "$HF_CHECKPOINT"
use_precision "${PRECISION:-fp8}"

# One step is 64 problems; 17,920 of them = 280 steps, one epoch.
EPOCHS=1 GLOBAL_BATCH=64
SEQ_LENGTH=512 MAX_TOKENS_PER_GPU=8192 RECOMPUTE=none
NODES=${NODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-1} TP=1 PP=1 CP=1 # 3 KV groups: no tensor parallelism
LR=2e-4 MIN_LR=2e-5
SEED=1236
SAVE_INTERVAL=140 EVAL_INTERVAL=70 EVAL_EXACT_MATCH=256

require REF_LOAD "checkpoints of stage 1"
start_from_base "$REF_LOAD"
launch_sft "$@"
