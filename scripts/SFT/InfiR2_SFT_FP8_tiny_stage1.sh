#!/usr/bin/env bash
# The quickstart's SFT stage 1 (easy problems) on a model of 0.9 M parameters, on one CPU or GPU.
#
#   bash scripts/quickstart.sh       # makes the data, then runs this and its BF16 control
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/sft.sh"

NAME=${NAME:-InfiR2_SFT_FP8_tiny_stage1}
RUN_DIR=$OUTPUT_ROOT/$NAME
require HF_CHECKPOINT "Hugging Face folder of the tiny base model: shape and tokenizer"
use_model tiny "$HF_CHECKPOINT"
use_precision "${PRECISION:-fp8}"

# One step is 32 problems; 2,400 of them, four epochs = 300 steps.
EPOCHS=4 GLOBAL_BATCH=32
SEQ_LENGTH=128 MAX_TOKENS_PER_GPU=4096 RECOMPUTE=none
NODES=${NODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-1} TP=1 PP=1 CP=1
LR=1.5e-3 MIN_LR=1.5e-4
SEED=${SEED:-1236}
SAVE_INTERVAL=150 EVAL_INTERVAL=150 EVAL_EXACT_MATCH=128

require REF_LOAD "checkpoints of the tiny CPT run"
start_from_base "$REF_LOAD"
launch_sft "$@"
