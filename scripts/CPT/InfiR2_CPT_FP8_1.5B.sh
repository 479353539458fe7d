#!/usr/bin/env bash
# Continual pre-training of Qwen2.5-1.5B in FP8: warmup, stable and decay in one run. docs/CPT.md explains each number.
#
#   export DATA_DIR=data/cpt HF_CHECKPOINT=models/Qwen2.5-1.5B REF_LOAD=models/Qwen2.5-1.5B_torch_dist
#   bash scripts/CPT/InfiR2_CPT_FP8_1.5B.sh                        # 8 GPUs; run it again to resume
#   bash scripts/CPT/InfiR2_CPT_FP8_1.5B.sh --nnodes 4 --rdzv_endpoint node0:29400      # the same line on every node
#   DRY_RUN=1 bash scripts/CPT/InfiR2_CPT_FP8_1.5B.sh --train-iters 100                 # print; extra flags win
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/cpt.sh"

NAME=${NAME:-InfiR2_CPT_FP8_1.5B}
RUN_DIR=$OUTPUT_ROOT/$NAME
require HF_CHECKPOINT "Hugging Face folder of Qwen2.5-1.5B: shape and tokenizer"
use_model Qwen2.5-1.5B "$HF_CHECKPOINT"
use_precision "${PRECISION:-fp8}"

# One step is 128 sequences of 32,768 tokens = 4.19 M tokens; 40,000 steps = 168 B tokens.
SEQ_LENGTH=32768 GLOBAL_BATCH=128 MICRO_BATCH=1
NPROC=${NPROC:-8} TP=${TP:-2} PP=1 CP=1
WARMUP_ITERS=5000 TRAIN_ITERS=40000 DECAY_ITERS=5000
LR=1e-4 MIN_LR=1e-5
SEED=1236

require REF_LOAD "torch_dist folder of the base model: tools/convert_hf_to_torch_dist.py makes it"
start_from_base "$REF_LOAD"
launch_cpt "$@"
