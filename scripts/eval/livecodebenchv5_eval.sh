#!/usr/bin/env bash
#SBATCH --job-name=livecodebenchv5
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=1-00:00:00
# LiveCodeBench v5, contests from August 2024 to January 2025: 8 programs for each problem. The score is the share of
# programs that pass all tests. They run in a sandbox, after the server has ended.
#
#   export DATASET_LOCAL=data/benchmarks MODEL_PATH=models/InfiR2-7B-FP8
#   bash scripts/eval/livecodebenchv5_eval.sh         # on this machine
#   sbatch scripts/eval/livecodebenchv5_eval.sh       # from the repository root
set -euo pipefail
ROOT=$(dirname "${BASH_SOURCE[0]}")/../..
if [[ ! -d $ROOT/scripts/lib ]]; then ROOT=$SLURM_SUBMIT_DIR; fi # Slurm runs a copy of this file
source "$ROOT/scripts/lib/eval.sh"

BENCHMARK=livecodebenchv5 DATASET=lcb
SAMPLES=8 MAX_TOKENS=27000 TEMPERATURE=0.65 TOP_P=0.95

run_eval "$@"
