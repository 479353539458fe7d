# shellcheck shell=bash
# Evaluation: serve a model, let evalscope ask it, stop the server, report. A script sets the numbers and calls:
# run_eval "$@"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# set_up_evalscope: evalscope in an environment of its own, .venv-eval; EVALSCOPE_PYTHON names another that has it.
set_up_evalscope() {
    [[ -z ${EVALSCOPE_PYTHON:-} ]] || return 0
    local VENV=$REPO_ROOT/.venv-eval file=$REPO_ROOT/requirements-eval.txt stamp base
    EVALSCOPE_PYTHON=$VENV/bin/python
    stamp="$(cksum <"$file") $REPO_ROOT"
    exec 9<"$file" && flock 9 # elements of a Slurm array start together
    if [[ -x $EVALSCOPE_PYTHON && -f $VENV/infir2-stamp && $(<"$VENV/infir2-stamp") == "$stamp" ]]; then exec 9<&- && return; fi
    base=$(find_python) || die "no Python 3.12 or newer with venv found; install one, or set EVALSCOPE_PYTHON to a Python \
that has $(tail -n 2 "$file" | head -n 1)"
    log "set-up of evalscope with $base: about 800 MB into .venv-eval"
    make_venv "$base" >&2
    # Not compiled ahead, as `install` does: most of it is never imported, and that takes minutes.
    local installer=("$EVALSCOPE_PYTHON" -m pip install --disable-pip-version-check)
    if "${installer[@]}" --quiet uv >/dev/null 2>&1; then installer=("$VENV/bin/uv" pip install --python "$EVALSCOPE_PYTHON"); fi
    "${installer[@]}" -r "$file" >&2 || die "installing $file failed; the lines above say why"
    echo "$stamp" >"$VENV/infir2-stamp"
    exec 9<&-
}

# eval_backend: what serves, SGLang (gpu) or transformers (cpu); TP GPUs are needed. A server at API_URL needs none.
eval_backend() {
    TP=${TP:-1}
    if [[ -n ${API_URL:-} ]]; then BACKEND=${INFIR2_BACKEND:-cpu}; else use_backend "$TP" TP; fi
}

# run_eval [FLAG...]: flags of tools/evaluate.py given here come last, so they win.
run_eval() {
    require DATASET_LOCAL "folder that holds aime24/, aime25/, gpqa/ and lcb/ (docs/eval.md)"
    eval_backend
    local args=(
        --benchmark "$BENCHMARK" --dataset "$DATASET_LOCAL/$DATASET" --output "${OUTPUT:-$OUTPUT_ROOT/eval}"
        --samples "$SAMPLES" --max-tokens "$MAX_TOKENS" --temperature "$TEMPERATURE" --top-p "$TOP_P"
        --backend "$BACKEND" --tensor-parallel "$TP"
    )
    # One word each with its flag: a value may begin with a dash
    if [[ -n ${SYSTEM_PROMPT:-} ]]; then args+=(--system-prompt="$SYSTEM_PROMPT"); fi
    if [[ -n ${PROMPT_TEMPLATE:-} ]]; then args+=(--prompt-template="$PROMPT_TEMPLATE"); fi
    if [[ -n ${API_URL:-} ]]; then args+=(--api-url "$API_URL"); fi
    if [[ -n ${SGLANG_ARGS:-} && $BACKEND == gpu ]]; then args+=(--server-args="$SGLANG_ARGS"); fi
    if [[ -n ${PORT:-} ]]; then args+=(--port "$PORT"); fi
    model_args "$@"
    if [[ ${DRY_RUN:-0} == 1 ]]; then args+=(--dry-run); else set_up_evalscope; fi
    exec "$PYTHON" "$REPO_ROOT/tools/evaluate.py" "${args[@]}" --evalscope "${EVALSCOPE_PYTHON:-$REPO_ROOT/.venv-eval/bin/python}" "$@"
}

# model_args [FLAG...]: add MODEL_PATH under NAME, and the folders of TRAINED_ON (split at colons), to args. Flags may
# name models instead, and then their training data too.
model_args() {
    local folder folders word
    if [[ ${MARK_OVERLAP:-0} == 1 ]]; then args+=(--mark-overlap); fi
    for word in "$@"; do
        [[ $word == --model || $word == --model=* ]] || continue
        [[ -z ${TRAINED_ON:-} ]] || die "TRAINED_ON is of MODEL_PATH, and --model names others: give --trained-on NAME=FOLDER"
        return 0
    done
    [[ -n ${API_URL:-} ]] || require MODEL_PATH "Hugging Face folder of the model to evaluate"
    if [[ -z ${MODEL_PATH:-} ]]; then
        [[ -z ${TRAINED_ON:-} ]] || die "TRAINED_ON is of MODEL_PATH: set that, to the model's name at the server"
        return 0
    fi
    NAME=${NAME:-$(basename "$MODEL_PATH")}
    [[ $NAME != *=* ]] || die "the name $NAME has an equals sign: set NAME to another"
    args+=(--model "$NAME=$MODEL_PATH")
    IFS=: read -ra folders <<<"${TRAINED_ON:-}"
    for folder in "${folders[@]}"; do args+=(--trained-on "$NAME=$folder"); done
}
