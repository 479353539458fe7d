# shellcheck shell=bash
# Continual pre-training on Megatron. A script sets the numbers, where to start, and calls: launch_cpt "$@"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"
source "$(dirname "${BASH_SOURCE[0]}")/precision.sh"
source "$(dirname "${BASH_SOURCE[0]}")/megatron.sh"

# branch_from RUN ITERATION STEPS: the first launch continues RUN from ITERATION, optimizer included, for STEPS more;
# later ones resume this run. The data index keeps RUN's length, so that the branch sees what RUN would have seen.
branch_from() {
    TRAIN_ITERS=$(($2 + $3))
    START_ARGS=(
        --load "$OUTPUT_ROOT/$1/checkpoints" --ckpt-step "$2" --override-opt_param-scheduler
        --data-index-iters "$PARENT_TRAIN_ITERS"
    )
}

# branch_iteration WORD...: the iteration in a documented `--load .../iter_0035000` among the words, or nothing.
branch_iteration() {
    local word
    for word in "$@"; do
        if [[ $word =~ (^|/)iter_0*([1-9][0-9]*)/?$ ]]; then echo "${BASH_REMATCH[2]}"; fi
    done
}

# launch_cpt [FLAG...]: Megatron's flags given here come last, so they win. --nnodes and --rdzv_endpoint go to torchrun.
launch_cpt() {
    require DATA_DIR "folder that tools/prepare_data.py cpt wrote: train and valid, .bin and .idx"
    take_launcher_flags "$@"
    use_backend "$NPROC"
    backend_args
    cpt_speed_args
    train_data
    log_args
    wandb_args
    local args=(
        "${MODEL_ARGS[@]}" "${PRECISION_ARGS[@]}" "${BACKEND_ARGS[@]}" "${SPEED_ARGS[@]}"
        --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
        --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH"
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"

        --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style WSD --lr-wsd-decay-style cosine
        --train-iters "$TRAIN_ITERS" --lr-warmup-iters "$WARMUP_ITERS" --lr-wsd-decay-iters "$DECAY_ITERS"
        --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed "$SEED"

        --train-data-path "${TRAIN_DATA[@]}" --valid-data-path "$DATA_DIR/valid"
        --data-cache-path "$OUTPUT_ROOT/data_cache" --no-create-attention-mask-in-dataloader

        --save "$RUN_DIR/checkpoints" --save-interval "${SAVE_INTERVAL:-1000}" "${START_ARGS[@]}"
        --eval-interval "${EVAL_INTERVAL:-100}" --eval-iters "${EVAL_ITERS:-10}"
        "${LOG_ARGS[@]}"
    )
    if ((TP > 1)); then args+=(--sequence-parallel); fi
    launcher
    run "${LAUNCHER[@]}" -m infir2.pretrain "${args[@]}" "${WANDB_ARGS[@]}" "${FLAGS[@]}"
}

# cpt_speed_args: what makes steps faster and was not run on fine-tuning's packed, recomputed samples. LIBRARIES=0 leaves
# out what needs FlashAttention 4, DeepGEMM and nvcc (requirements-gpu.txt).
cpt_speed_args() {
    speed_args
    ((${#SPEED_ARGS[@]})) || return 0
    SPEED_ARGS+=(--fused-qkv-rope --fused-embedding-gradient)
    # Not where layers have a precision of their own.
    if [[ " ${PRECISION_ARGS[*]} " != *" --te-precision-config-file "* ]]; then
        SPEED_ARGS+=(--fused-swiglu-quantisation)
    fi
    # A shared layer's kernels are short, and these take the CPU longer to launch: not measured there.
    ((TP == 1)) || return 0
    SPEED_ARGS+=(--fused-norm-quantisation --fast-quantisation)
    if [[ ${LIBRARIES:-1} == 1 ]]; then SPEED_ARGS+=(--flash-attention-4 --deep-gemm); fi
}

# train_data: set TRAIN_DATA to Megatron's words for the training tokens: one prefix, or weights and prefixes of a blend.
train_data() {
    TRAIN_DATA=("$DATA_DIR/train")
    [[ -f $DATA_DIR/train.blend ]] || return 0
    local weight prefix
    TRAIN_DATA=()
    while read -r weight prefix; do TRAIN_DATA+=("$weight" "$DATA_DIR/$prefix"); done <"$DATA_DIR/train.blend"
}

# take_launcher_flags WORD...: split the user's words into torchrun's (NNODES, RDZV_ENDPOINT) and FLAGS for Megatron.
take_launcher_flags() {
    FLAGS=()
    while (($#)); do
        case $1 in
            --nnodes=* | --rdzv_endpoint=* | --rdzv-endpoint=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
            --nnodes | --rdzv_endpoint | --rdzv-endpoint)
                (($# > 1)) || die "$1 needs a value"
                if [[ $1 == --nnodes ]]; then NNODES=$2; else RDZV_ENDPOINT=$2; fi
                shift 2
                ;;
            *) FLAGS+=("$1") && shift ;;
        esac
    done
}

# launcher: set LAUNCHER. One process needs none; one node meets on a free port of its own; under srun several nodes meet
# on the allocation's first.
launcher() {
    if [[ -n ${SLURM_JOB_NUM_NODES:-} && -n ${SLURM_STEP_ID:-} ]]; then NNODES=${NNODES:-$SLURM_JOB_NUM_NODES}; fi
    if [[ ${NNODES:-1} != 1 && -n ${SLURM_STEP_ID:-} ]]; then
        RDZV_ENDPOINT=${RDZV_ENDPOINT:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29400}
    fi
    LAUNCHER=("$PYTHON")
    if ((NPROC * ${NNODES:-1} == 1)); then return; fi
    if [[ ${NNODES:-1} == 1 ]]; then RDZV_ENDPOINT=${RDZV_ENDPOINT:-localhost:0}; fi
    require RDZV_ENDPOINT "host:port where the ${NNODES:-1} nodes meet, the same on each: node0:29400 (--rdzv_endpoint)"
    LAUNCHER+=(-m torch.distributed.run --nnodes "${NNODES:-1}" --nproc-per-node "$NPROC" --rdzv-backend c10d)
    LAUNCHER+=(--rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${SLURM_JOB_ID:-$NAME}")
}
