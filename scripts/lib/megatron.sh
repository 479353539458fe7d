# shellcheck shell=bash
# What every run on Megatron has in common: where it starts, what the machine decides, what is logged. Source it.
# shellcheck disable=SC2034 # the arrays are for the launch functions of cpt.sh and sft.sh

# start_from_base FOLDER: the first launch begins with these weights (torch_dist); later ones resume this run.
start_from_base() { START_ARGS=(--load "$RUN_DIR/checkpoints" --pretrained-checkpoint "$1"); }

# backend_args: what only the machine decides. On a CPU infir2.backend adds its own flags.
backend_args() {
    BACKEND_ARGS=()
    export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron asks for it under tensor parallelism: communication is queued first
    [[ $BACKEND == gpu ]] || return 0
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    BACKEND_ARGS=(
        --transformer-impl transformer_engine --attention-backend fused
        --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        --dist-ckpt-optim-fully-reshardable # masters by name: they survive another TP, PP or DP
        --distributed-timeout-minutes 120 --num-workers 6
    )
}

# speed_args: set SPEED_ARGS, which make a GPU's steps faster and leave the maths as it is (docs/performance.md).
# FUSED=0 leaves them out. Reinforcement learning, which needs logits, has none of them.
speed_args() {
    SPEED_ARGS=()
    [[ $BACKEND == gpu && ${FUSED:-1} == 1 ]] || return 0
    SPEED_ARGS=(--fused-linear-cross-entropy --fused-weight-gradient --check-gradients-once)
}

# log_args: set LOG_ARGS. TensorBoard is always on.
log_args() {
    LOG_ARGS=(--log-interval 1 --log-throughput --log-timers-to-tensorboard --tensorboard-dir "$RUN_DIR/tensorboard")
}

# wandb_args: set WANDB_ARGS; empty without WANDB_PROJECT. A run that is resumed goes on under its first id.
wandb_args() {
    WANDB_ARGS=()
    [[ -n ${WANDB_PROJECT:-} ]] || return 0
    export WANDB_MODE=${WANDB_MODE:-offline}
    if [[ ${DRY_RUN:-0} != 1 ]]; then
        local id=$RUN_DIR/wandb_id
        mkdir -p "$RUN_DIR" || die "cannot make the run's folder $RUN_DIR"
        [[ -s $id ]] || (set -o noclobber && printf '%04x%04x' "$RANDOM" "$RANDOM" >"$id") 2>/dev/null || true
        WANDB_RUN_ID=$(<"$id")
        export WANDB_RUN_ID WANDB_RESUME=allow
    fi
    WANDB_ARGS=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "$NAME" --wandb-save-dir "$RUN_DIR/wandb")
}
