# shellcheck shell=bash
# Reinforcement learning on Ray: Megatron trains, SGLang generates. A script sets the numbers, where to start, and
# calls: launch_rl "$@"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"
source "$(dirname "${BASH_SOURCE[0]}")/precision.sh"
source "$(dirname "${BASH_SOURCE[0]}")/megatron.sh"
source "$(dirname "${BASH_SOURCE[0]}")/ray.sh"

# launch_rl [FLAG...]: flags given here come last, so they win. --actor-num-nodes and --actor-num-gpus-per-node are also
# NODES and GPUS_PER_NODE.
launch_rl() {
    require RL_DATA "prompts: train.jsonl of a folder that tools/prepare_data.py rl wrote"
    take_launcher_flags "$@"
    find_ray
    use_ray_backend
    backend_args
    without_overlapping_gathers
    log_args
    wandb_args
    engine_args
    eval_args
    local args=(
        --actor-num-nodes "$NODES" --actor-num-gpus-per-node "$GPUS_PER_NODE" "${LAUNCH_ARGS[@]}" "${ENGINE_ARGS[@]}"
        "${MODEL_ARGS[@]}" "${PRECISION_ARGS[@]}" "${BACKEND_ARGS[@]}"
        --hf-checkpoint "${ENGINE_MODEL:-$HF_CHECKPOINT}" --prompt-data "$RL_DATA" --rollout-shuffle --seed "$SEED"
        --rollout-max-prompt-len "$PROMPT_LENGTH" --rollout-max-response-len "$RESPONSE_LENGTH"
        --num-rollout "$STEPS" --rollout-batch-size "$PROMPTS" --n-samples-per-prompt "$SAMPLES"
        --rollout-temperature "$TEMPERATURE" --over-sampling-batch-size "$OVER_SAMPLING" --dynamic-sampling
        --rm-type "${REWARD:-deepscaler}" --overlong-buffer-len "${OVERLONG_BUFFER:-0}"

        --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --use-tis
        --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
        --global-batch-size "$((PROMPTS * SAMPLES))" --use-dynamic-batch-size --max-tokens-per-gpu "$MAX_TOKENS_PER_GPU"
        --calculate-per-token-loss
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"

        --lr "$LR" --lr-decay-style constant
        --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98 --clip-grad 1.0

        --save "$RUN_DIR/checkpoints" --save-interval "${SAVE_INTERVAL:-20}" "${START_ARGS[@]}"
        --eval-interval "${EVAL_INTERVAL:-20}" "${EVAL_ARGS[@]}"
        --metrics-file "$RUN_DIR/metrics.jsonl" "${LOG_ARGS[@]}"
    )
    if ((TP > 1)); then args+=(--sequence-parallel); fi
    if [[ ${RECOMPUTE:-full} == full ]]; then
        args+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
    fi
    run_driver_on_ray infir2.rl "${args[@]}" "${WANDB_ARGS[@]}" "${FLAGS[@]}"
}

# without_overlapping_gathers: the engines take the weights right after a step, so they are gathered in the step.
without_overlapping_gathers() {
    local word kept=()
    for word in "${BACKEND_ARGS[@]}"; do
        if [[ $word != --overlap-param-gather ]]; then kept+=("$word"); fi
    done
    BACKEND_ARGS=("${kept[@]}")
}

# engine_args: set ENGINE_ARGS. COLOCATE=1, the default, lets SGLang and Megatron take turns on the same GPUs; else
# ROLLOUT_GPUS more GPUs are the engines'.
engine_args() {
    ENGINE_ARGS=()
    [[ $BACKEND == gpu ]] || return 0
    ENGINE_ARGS=(
        --rollout-num-gpus-per-engine "$ENGINE_GPUS" --sglang-mem-fraction-static "${ENGINE_MEMORY:-0.6}"
        --sglang-arguments="${SGLANG_ARGS:-}" # one word: its value may begin with a dash
    )
    if [[ -n ${SGLANG_PYTHON:-} ]]; then ENGINE_ARGS+=(--sglang-python "$SGLANG_PYTHON"); fi
    if [[ ${COLOCATE:-1} == 1 ]]; then
        ENGINE_ARGS+=(--colocate)
    else
        require ROLLOUT_GPUS "how many GPUs the engines have, apart from the trainers', with COLOCATE=0"
        ENGINE_ARGS+=(--rollout-num-gpus "$ROLLOUT_GPUS")
    fi
}

# eval_args: set EVAL_ARGS; empty without EVAL_DATA.
eval_args() {
    EVAL_ARGS=()
    [[ -n ${EVAL_DATA:-} ]] || return 0
    EVAL_ARGS=(
        --eval-prompt-data "${EVAL_NAME:-eval}" "$EVAL_DATA" --n-samples-per-eval-prompt "${EVAL_SAMPLES:-1}"
        --eval-max-response-len "${EVAL_LENGTH:-$RESPONSE_LENGTH}" --eval-temperature "${EVAL_TEMPERATURE:-0}"
        --eval-top-p "${EVAL_TOP_P:-1}"
    )
}
