#!/usr/bin/env bash
#SBATCH --job-name=aime25
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=1-00:00:00
# AIME 2025: 30 problems, 32 answers to each. The score is the mean over all answers.
#
#   export DATASET_LOCAL=data/benchmarks MODEL_PATH=models/InfiR2-7B-FP8
#   bash scripts/eval/aime25_eval.sh         # on this machine
#   sbatch scripts/eval/aime25_eval.sh       # from the repository root
set -euo pipefail
ROOT=$(dirname "${BASH_SOURCE[0]}")/../..
if [[ ! -d $ROOT/scripts/lib ]]; then ROOT=$SLURM_SUBMIT_DIR; fi # Slurm runs a copy of this file
source "$ROOT/scripts/lib/eval.sh"

BENCHMARK=aime25 DATASET=aime25
SAMPLES=32 MAX_TOKENS=31000 TEMPERATURE=0.65 TOP_P=0.95 # 30 x 32 = 960 answers
SYSTEM_PROMPT='Please reason step by step, and put your final answer within \boxed{}.' # the recipe's
PROMPT_TEMPLATE='{question}'

run_eval "$@"
