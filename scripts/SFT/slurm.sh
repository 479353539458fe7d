#!/usr/bin/env bash
#SBATCH --job-name=infir2-sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=7-00:00:00
# An SFT script on a Slurm allocation: Ray over all of its nodes, the script on the first, Ray stopped at the end.
#
#   sbatch scripts/SFT/slurm.sh scripts/SFT/InfiR2_SFT_FP8_7B_stage1.sh [FLAG...]          # from the repository root
#   sbatch --nodes=1 scripts/SFT/slurm.sh scripts/SFT/InfiR2_SFT_FP8_7B_stage1.sh          # sbatch's own flags come first
set -euo pipefail
ROOT=$(dirname "${BASH_SOURCE[0]}")/../..
if [[ ! -d $ROOT/scripts/lib ]]; then ROOT=$SLURM_SUBMIT_DIR; fi # Slurm runs a copy of this file
source "$ROOT/scripts/lib/common.sh"

require SLURM_JOB_NODELIST "nothing by hand: Slurm sets it; start this with sbatch"
(($#)) || die "name the script to run: sbatch scripts/SFT/slurm.sh scripts/SFT/InfiR2_SFT_FP8_7B_stage1.sh"
[[ -f $1 ]] || die "$1 is not a file; start from the repository root"
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH # symmetric-run calls `ray` by that name

export PATH NODES=$SLURM_JOB_NUM_NODES GPUS_PER_NODE=${GPUS_PER_NODE:-8}
# This cluster's token, for this job alone: without one, whoever reaches the head's ports can run commands as you.
RAY_AUTH_TOKEN=$("$PYTHON" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
# Ray's own: 30 s, short on a busy file system; and niceness 15
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300} RAY_worker_niceness=0

# The script joins the cluster as one of its nodes (RAY_ADDRESS), so its exit status is srun's.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    ray symmetric-run --address "$HEAD:6379" --min-nodes "$SLURM_JOB_NUM_NODES" --num-gpus "$GPUS_PER_NODE" -- \
    env RAY_ADDRESS="$HEAD:6379" bash "$@"
