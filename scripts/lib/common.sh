# shellcheck shell=bash
# Shared by every script: messages, required settings, the Python to run, dry run. Source it; do not run it.
set -euo pipefail

REPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
OUTPUT_ROOT=${OUTPUT_ROOT:-$REPO_ROOT/exp}
export PYTHONPATH=$REPO_ROOT/training${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# The project's own environment where set-up made one, else the python on PATH (a container, a cluster's module).
if [[ -z ${PYTHON:-} ]]; then
    if [[ -x $REPO_ROOT/.venv/bin/python ]]; then PYTHON=$REPO_ROOT/.venv/bin/python; else PYTHON=python3; fi
fi

# SGLang's has other versions of what training pins: requirements-sglang.txt.
if [[ -z ${SGLANG_PYTHON:-} && -x $REPO_ROOT/.venv-sglang/bin/python ]]; then
    export SGLANG_PYTHON=$REPO_ROOT/.venv-sglang/bin/python
fi

log() { printf '[%s] %s\n' "${0##*/}" "$*" >&2; }
die() {
    log "error: $*"
    exit 2
}

# require VAR MEANING: stop, before anything is started, if the user has not set VAR.
require() { [[ -n ${!1:-} ]] || die "set $1: $2"; }

# read_words ARRAY COMMAND...: the command's output, one word a line, into ARRAY; its failure is ours.
read_words() {
    local -n words=$1
    local output
    output=$("${@:2}") || exit 2
    # shellcheck disable=SC2034 # words is the caller's array
    mapfile -t words <<<"$output"
}

# visible_gpus: the GPUs of this node that we may use, one a line: those of CUDA_VISIBLE_DEVICES where that is set.
visible_gpus() {
    local found device
    found=$(command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || return 0
    for device in $(if [[ -v CUDA_VISIBLE_DEVICES ]]; then echo "${CUDA_VISIBLE_DEVICES//,/ }"; else seq 0 $((found - 1)); fi); do
        if [[ $device =~ ^-?[0-9]+$ ]] && ((device < 0 || device >= found)); then break; fi # CUDA stops there, too
        echo "$device"
    done
}

gpu_count() { visible_gpus | wc -l; }

# use_backend NPROC [SETTING]: set BACKEND (cpu or gpu) and refuse where this node cannot run NPROC processes; the user
# changes that number by SETTING. INFIR2_BACKEND=cpu runs on the CPU of a GPU machine.
use_backend() {
    local gpus
    gpus=$(gpu_count)
    BACKEND=${INFIR2_BACKEND:-}
    if [[ -z $BACKEND ]]; then if ((gpus > 0)); then BACKEND=gpu; else BACKEND=cpu; fi; fi
    export INFIR2_BACKEND=$BACKEND
    [[ ${DRY_RUN:-0} == 1 ]] && return
    if [[ $BACKEND == gpu ]] && ((gpus < $1)); then
        die "this run needs $1 GPUs on each node, found $gpus; set ${2:-NPROC}"
    fi
    if [[ $BACKEND == cpu ]] && (($1 > 2)); then
        die "this run needs $1 GPUs on each node, found $gpus; scripts/quickstart.sh runs on a CPU"
    fi
}

# announce WORD...: keep the exact command and commit beside the run. DRY_RUN=1 prints the command instead, and fails.
announce() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "$@"
        echo
        return 1
    fi
    mkdir -p "$RUN_DIR" || die "cannot make the run's folder $RUN_DIR"
    printf '%q ' "$@" >"$RUN_DIR/command.sh"
    git -C "$REPO_ROOT" describe --always --dirty >"$RUN_DIR/commit" 2>/dev/null || echo "not a git checkout" >"$RUN_DIR/commit"
    log "run directory: $RUN_DIR"
}

# run WORD...: announce the command and become it: a signal to the script then ends the run.
run() {
    announce "$@" || return 0
    exec "$@"
}
