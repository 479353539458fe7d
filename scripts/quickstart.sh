#!/usr/bin/env bash
# Set up, then run the recipe on this machine: about 10 minutes on 2 CPU cores. Run again, it reuses what is there.
#
#   bash scripts/quickstart.sh
#
# A tiny Qwen2.5-architecture model, random at first, is pre-trained through Megatron twice, in FP8 and in BF16 on the
# same data in the same order; the FP8 one is converted to Hugging Face, cast to block FP8, and answers three prompts.
# On a CPU the FP8 arithmetic is emulated, scale by scale; on a Hopper GPU it is TransformerEngine's.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/setup.sh"

started=$SECONDS
set_up
log "set-up: $((SECONDS - started)) s"
cd "$REPO_ROOT"
QUICKSTART=${QUICKSTART:-$OUTPUT_ROOT/quickstart}
export OUTPUT_ROOT=$QUICKSTART HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
export DATA_DIR=$QUICKSTART/data HF_CHECKPOINT=$QUICKSTART/base REF_LOAD=$QUICKSTART/base_torch_dist
FP8_RUN=$QUICKSTART/InfiR2_CPT_FP8_tiny BF16_RUN=$QUICKSTART/InfiR2_CPT_BF16_tiny
HF=$QUICKSTART/InfiR2_tiny HF_FP8=$QUICKSTART/InfiR2_tiny_FP8
STAGES=$QUICKSTART/stages.tsv
mkdir -p "$QUICKSTART"

# stage NAME RESULT COMMAND...: run a stage unless its result is there; its seconds go into stages.tsv for the report.
# Each command makes its result under another name first, so a result that exists is complete.
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

pretrain_both() {
    local threads=$(($(getconf _NPROCESSORS_ONLN) / 2))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    local scripts=$REPO_ROOT/scripts/CPT
    "$PYTHON" tools/side_by_side.py --run FP8 "$FP8_RUN/log.txt" "bash $(printf %q "$scripts")/InfiR2_CPT_FP8_tiny.sh" \
        --run BF16 "$BF16_RUN/log.txt" "bash $(printf %q "$scripts")/InfiR2_CPT_BF16_tiny.sh"
    touch "$QUICKSTART/pretrained"
}

answer() {
    "$PYTHON" tools/generate.py --model "$HF" --prompt "In the beginning" --prompt $'Question: What is 27 + 45?\n' \
        --prompt "And it came to pass" >"$QUICKSTART/answers.json.tmp"
    mv "$QUICKSTART/answers.json.tmp" "$QUICKSTART/answers.json"
}

bigram() {
    "$PYTHON" tools/bigram_baseline.py --data "$DATA_DIR" >"$QUICKSTART/bigram.json.tmp"
    mv "$QUICKSTART/bigram.json.tmp" "$QUICKSTART/bigram.json"
}

stage corpus "$QUICKSTART/corpus" "$PYTHON" tools/quickstart_corpus.py --output "$QUICKSTART/corpus"
stage data "$DATA_DIR" "$PYTHON" tools/prepare_data.py cpt --input "$QUICKSTART/corpus/train.jsonl" \
    --valid-input "$QUICKSTART/corpus/valid.jsonl" --tokenizer "$QUICKSTART/corpus/tokenizer" --output "$DATA_DIR"
stage bigram "$QUICKSTART/bigram.json" bigram
stage base "$HF_CHECKPOINT" "$PYTHON" tools/make_base_model.py --tokenizer "$QUICKSTART/corpus/tokenizer" \
    --output-dir "$HF_CHECKPOINT"
stage base_torch_dist "$REF_LOAD" "$PYTHON" tools/convert_hf_to_torch_dist.py --input-dir "$HF_CHECKPOINT" \
    --output-dir "$REF_LOAD"
stage pretraining "$QUICKSTART/pretrained" pretrain_both
stage to_hf "$HF" "$PYTHON" tools/convert_torch_dist_to_hf.py --input-dir "$FP8_RUN/checkpoints" --output-dir "$HF" \
    --origin-hf-dir "$HF_CHECKPOINT"
stage to_fp8 "$HF_FP8" "$PYTHON" tools/bf16_cast_fp8.py --input-bf16-hf-path "$HF" --output-fp8-hf-path "$HF_FP8"
stage answers "$QUICKSTART/answers.json" answer
"$PYTHON" tools/quickstart_report.py "$QUICKSTART"
log "done in $((SECONDS - started)) s; open $QUICKSTART/report.html"
