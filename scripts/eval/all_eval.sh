#!/usr/bin/env bash
#SBATCH --job-name=infir2-eval
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=1-00:00:00
#SBATCH --array=0-3
# Every benchmark for every checkpoint. By bash one after the other, checkpoints side by side in each benchmark's report;
# by sbatch an array, whose elements share the pairs of a benchmark and a checkpoint out among themselves.
#
#   export DATASET_LOCAL=data/benchmarks
#   bash scripts/eval/all_eval.sh FP8=models/InfiR2-7B-FP8 BF16=models/InfiR2-7B
#   sbatch --array=0-7 scripts/eval/all_eval.sh FP8=models/InfiR2-7B-FP8 BF16=models/InfiR2-7B        # 4 x 2 pairs
#
# After the array has ended, the line with bash makes the reports that compare: it finds every answer there.
set -euo pipefail
ROOT=$(dirname "${BASH_SOURCE[0]}")/../..
if [[ ! -d $ROOT/scripts/lib ]]; then ROOT=$SLURM_SUBMIT_DIR; fi # Slurm runs a copy of this file
source "$ROOT/scripts/lib/common.sh"

BENCHMARKS=(aime24 aime25 gpqa livecodebenchv5)
CHECKPOINTS=() FLAGS=()
for word in "$@"; do
    if ((${#FLAGS[@]} == 0)) && [[ $word == [!-]*=* ]]; then CHECKPOINTS+=("$word"); else FLAGS+=("$word"); fi
done
((${#CHECKPOINTS[@]})) || die "name the checkpoints: bash scripts/eval/all_eval.sh NAME=FOLDER... [FLAG...]"

if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
    MODELS=()
    for checkpoint in "${CHECKPOINTS[@]}"; do MODELS+=(--model "$checkpoint"); done
    for benchmark in "${BENCHMARKS[@]}"; do bash "$ROOT/scripts/eval/${benchmark}_eval.sh" "${MODELS[@]}" "${FLAGS[@]}"; done
    exit
fi
PAIRS=$((${#BENCHMARKS[@]} * ${#CHECKPOINTS[@]}))
for ((pair = SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}; pair < PAIRS; pair += ${SLURM_ARRAY_TASK_COUNT:-1})); do
    benchmark=${BENCHMARKS[pair % ${#BENCHMARKS[@]}]}
    checkpoint=${CHECKPOINTS[pair / ${#BENCHMARKS[@]}]}
    bash "$ROOT/scripts/eval/${benchmark}_eval.sh" --model "$checkpoint" "${FLAGS[@]}"
done
