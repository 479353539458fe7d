#!/usr/bin/env bash
# The quickstart's continual pre-training: the recipe's three phases on a model of 0.9 M parameters, on one CPU or GPU.
#
#   bash scripts/quickstart.sh       # makes the data and the base model, then runs this and its BF16 control
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/cpt.sh"

NAME=${NAME:-InfiR2_CPT_FP8_tiny}
RUN_DIR=$OUTPUT_ROOT/$NAME
require HF_CHECKPOINT "Hugging Face folder of the tiny base model: shape and tokenizer"
use_model tiny "$HF_CHECKPOINT"
use_precision "${PRECISION:-fp8}"

# One step is 16 sequences of 128 tokens = 2,048 tokens; 280 steps = 0.57 M tokens, a sixth of an epoch.
SEQ_LENGTH=128 GLOBAL_BATCH=16 MICRO_BATCH=16
NPROC=1 TP=1 PP=1 CP=1
WARMUP_ITERS=20 TRAIN_ITERS=280 DECAY_ITERS=100
LR=1.5e-3 MIN_LR=1.5e-4
SEED=${SEED:-1236}
SAVE_INTERVAL=140 EVAL_INTERVAL=140 EVAL_ITERS=26 # 26 x 16 sequences: nearly all that is held out

require REF_LOAD "torch_dist folder of the tiny base model"
start_from_base "$REF_LOAD"
launch_cpt "$@"
