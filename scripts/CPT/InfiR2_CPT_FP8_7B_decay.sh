#!/usr/bin/env bash
# The decay phase alone: branch from iteration ITER of InfiR2_CPT_FP8_7B's stable phase and anneal for DECAY_ITERS steps.
#
#   ITER=35000 bash scripts/CPT/InfiR2_CPT_FP8_7B_decay.sh
#   bash scripts/CPT/InfiR2_CPT_FP8_7B_decay.sh --load exp/InfiR2_CPT_FP8_7B/checkpoints/iter_0035000      # the same
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/cpt.sh"

ITER=${ITER:-$(branch_iteration "$@")}
require ITER "the stable-phase iteration to branch from, for example 35000"
PARENT=${PARENT:-InfiR2_CPT_FP8_7B}
NAME=${NAME:-${PARENT}_decay_$ITER}
RUN_DIR=$OUTPUT_ROOT/$NAME
require HF_CHECKPOINT "Hugging Face folder of Qwen2.5-7B: shape and tokenizer"
use_model Qwen2.5-7B "$HF_CHECKPOINT"
use_precision "${PRECISION:-fp8}"

SEQ_LENGTH=32768 GLOBAL_BATCH=128 MICRO_BATCH=1
NPROC=${NPROC:-8} TP=4 PP=1 CP=1
WARMUP_ITERS=0 DECAY_ITERS=${DECAY_ITERS:-5000} # warmup is long past
PARENT_TRAIN_ITERS=${PARENT_TRAIN_ITERS:-40000}
LR=1e-4 MIN_LR=1e-5
SEED=1236

branch_from "$PARENT" "$ITER" "$DECAY_ITERS"
launch_cpt "$@"
