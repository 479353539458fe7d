#!/usr/bin/env bash
#SBATCH --job-name=gpqa
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=1-00:00:00
# GPQA diamond: 198 problems with four choices, 8 answers to each. The score is the mean over all answers.
#
#   export DATASET_LOCAL=data/benchmarks MODEL_PATH=models/InfiR2-7B-FP8
#   bash scripts/eval/gpqa_eval.sh         # on this machine
#   sbatch scripts/eval/gpqa_eval.sh       # from the repository root
set -euo pipefail
ROOT=$(dirname "${BASH_SOURCE[0]}")/../..
if [[ ! -d $ROOT/scripts/lib ]]; then ROOT=$SLURM_SUBMIT_DIR; fi # Slurm runs a copy of this file
source "$ROOT/scripts/lib/eval.sh"

BENCHMARK=gpqa DATASET=gpqa
SAMPLES=8 MAX_TOKENS=26000 TEMPERATURE=0.65 TOP_P=0.95 # 198 x 8 = 1,584 answers

run_eval "$@"
