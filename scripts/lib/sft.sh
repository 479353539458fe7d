# shellcheck shell=bash
# Supervised fine-tuning on Ray. A script sets the numbers, where to start, and calls: launch_sft "$@"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"
source "$(dirname "${BASH_SOURCE[0]}")/precision.sh"
source "$(dirname "${BASH_SOURCE[0]}")/megatron.sh"
source "$(dirname "${BASH_SOURCE[0]}")/ray.sh"

# launch_sft [FLAG...]: flags given here come last, so they win. --actor-num-nodes and --actor-num-gpus-per-node (also
# NODES and GPUS_PER_NODE), --all-ranks-log and --wait-seconds go to the launcher.
launch_sft() {
    require DATA_DIR "folder that tools/prepare_data.py sft wrote"
    take_launcher_flags "$@"
    find_ray
    use_ray_backend
    backend_args
    speed_args
    log_args
    wandb_args
    local args=(
        "${MODEL_ARGS[@]}" "${PRECISION_ARGS[@]}" "${BACKEND_ARGS[@]}" "${SPEED_ARGS[@]}"
        --sft-data "$DATA_DIR" --num-epoch "$EPOCHS" --seed "$SEED"
        --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
        --global-batch-size "$GLOBAL_BATCH" --use-dynamic-batch-size --max-tokens-per-gpu "$MAX_TOKENS_PER_GPU"
        --calculate-per-token-loss
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"

        --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-warmup-fraction 0.05
        --weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0

        --save "$RUN_DIR/checkpoints" --save-interval "${SAVE_INTERVAL:-500}" "${START_ARGS[@]}"
        --eval-interval "${EVAL_INTERVAL:-100}" --eval-exact-match "${EVAL_EXACT_MATCH:-0}"
        "${LOG_ARGS[@]}"
    )
    if ((TP > 1)); then args+=(--sequence-parallel); fi
    if [[ ${RECOMPUTE:-full} == full ]]; then
        args+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
    fi
    run_on_ray infir2.sft "${args[@]}" "${WANDB_ARGS[@]}" "${FLAGS[@]}"
}
