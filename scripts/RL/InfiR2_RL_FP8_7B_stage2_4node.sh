#!/usr/bin/env bash
# RL stage 2 of the 7B model, from the masters of stage 1: responses of up to 16k tokens, at temperature 1.1.
# docs/RL.md explains each number.
#
#   export HF_CHECKPOINT=exp/InfiR2_RL_FP8_7B_stage1_hf_fp8 REF_LOAD=exp/InfiR2_RL_FP8_7B_stage1/checkpoints
#   export RL_DATA=data/dapo/train.jsonl EVAL_DATA=data/aime24/train.jsonl
#   bash scripts/RL/InfiR2_RL_FP8_7B_stage2_4node.sh           # on the head of a Ray cluster of 4 x 8 GPUs
#   DRY_RUN=1 bash scripts/RL/InfiR2_RL_FP8_7B_stage2_4node.sh --lr 2e-6      # print; extra flags win
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/rl.sh"

NAME=${NAME:-InfiR2_RL_FP8_7B_stage2}
RUN_DIR=$OUTPUT_ROOT/$NAME
require HF_CHECKPOINT "the parent's model in block FP8 (tools/bf16_cast_fp8.py): shape, tokenizer, what SGLang loads"
use_model Qwen2.5-7B "$HF_CHECKPOINT"
use_precision "${PRECISION:-fp8}"

# One step is 128 prompts x 16 samples = 2,048 responses; 384 prompts are begun, and those whose answers differ are kept.
STEPS=${STEPS:-10240} PROMPTS=128 SAMPLES=16 OVER_SAMPLING=384
PROMPT_LENGTH=2048 RESPONSE_LENGTH=16384 TEMPERATURE=1.1
SEQ_LENGTH=18432 MAX_TOKENS_PER_GPU=9216 # times CP: 18,432 tokens of a micro-batch
NODES=${NODES:-4} GPUS_PER_NODE=${GPUS_PER_NODE:-8} TP=4 PP=1 CP=2 ENGINE_GPUS=4
LR=1e-6
SEED=1236
SAVE_INTERVAL=20 EVAL_INTERVAL=20 EVAL_NAME=aime24 EVAL_SAMPLES=16 EVAL_LENGTH=30000 EVAL_TEMPERATURE=1.0 EVAL_TOP_P=0.7

require REF_LOAD "checkpoints of RL stage 1: exp/InfiR2_RL_FP8_7B_stage1/checkpoints"
start_from_base "$REF_LOAD"
launch_rl "$@"
