#!/usr/bin/env bash
# Continual pre-training of SmolLM2-135M (tools/make_smollm2_base.py) on the quickstart's corpus, on one GPU.
#
#   MODEL=smollm2-135m bash scripts/quickstart.sh       # makes data and base, then runs this and its BF16 control
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/cpt.sh"

NAME=${NAME:-InfiR2_CPT_FP8_smollm2-135m}
RUN_DIR=$OUTPUT_ROOT/$NAME
require HF_CHECKPOINT "Hugging Face folder of the base model: shape and tokenizer"
use_model smollm2-135m "$HF_CHECKPOINT"
use_precision "${PRECISION:-fp8}"

# One step is 32 sequences of 512 tokens = 16,384 tokens; 120 steps = 2.0 M tokens, less than an epoch.
SEQ_LENGTH=512 GLOBAL_BATCH=32 MICRO_BATCH=8
NPROC=1 TP=1 PP=1 CP=1 # 3 KV groups: no tensor parallelism
WARMUP_ITERS=10 TRAIN_ITERS=120 DECAY_ITERS=40
LR=2e-4 MIN_LR=2e-5
SEED=${SEED:-1236}
SAVE_INTERVAL=60 EVAL_INTERVAL=30 EVAL_ITERS=2 # 2 x 32 sequences: most of what is held out

require REF_LOAD "torch_dist folder of the base model"
start_from_base "$REF_LOAD"
launch_cpt "$@"
