# shellcheck shell=bash
# Running on Ray: which cluster, which backend, how a run is started there and ended. docs/SFT.md, "Start Ray".

# take_launcher_flags WORD...: split the user's words into LAUNCH_ARGS for infir2.ray_launch and FLAGS for the program.
take_launcher_flags() {
    FLAGS=() LAUNCH_ARGS=()
    while (($#)); do
        case $1 in
            --actor-num-nodes=* | --actor-num-gpus-per-node=* | --wait-seconds=*)
                set -- "${1%%=*}" "${1#*=}" "${@:2}"
                ;;
            --actor-num-nodes | --actor-num-gpus-per-node | --wait-seconds)
                (($# > 1)) || die "$1 needs a value"
                case $1 in
                    --actor-num-nodes) NODES=$2 ;;
                    --actor-num-gpus-per-node) GPUS_PER_NODE=$2 ;;
                    *) LAUNCH_ARGS+=("$1" "$2") ;;
                esac
                shift 2
                ;;
            --all-ranks-log) LAUNCH_ARGS+=("$1") && shift ;;
            *) FLAGS+=("$1") && shift ;;
        esac
    done
}

# find_ray: set RAY to a dashboard (http://...), to a cluster that this machine is a node of (host:6379), or to local.
# A dry run asks nobody: RAY_ADDRESS says it.
find_ray() {
    RAY=${RAY_ADDRESS:-local}
    [[ ${DRY_RUN:-0} == 1 ]] || RAY=$("$PYTHON" -m infir2.ray_cluster find) || exit 2
}

# use_ray_backend: set BACKEND. On this machine it is what the machine has; of a cluster's machines we know nothing here:
# GPUs, unless INFIR2_BACKEND=cpu. The launcher counts them.
use_ray_backend() {
    if [[ $RAY == local ]]; then
        ((NODES == 1)) || [[ ${DRY_RUN:-0} == 1 ]] ||
            die "this run needs $NODES nodes, and no Ray cluster answers; start Ray on each (docs/SFT.md), or set NODES=1"
        use_backend "$GPUS_PER_NODE" GPUS_PER_NODE
    else
        BACKEND=${INFIR2_BACKEND:-gpu}
        export INFIR2_BACKEND=$BACKEND
    fi
    if [[ $BACKEND == cpu ]]; then LAUNCH_ARGS+=(--cpu); fi
}

# run_on_ray MODULE FLAG...: start the module on NODES x GPUS_PER_NODE workers.
run_on_ray() {
    local command=(
        "$PYTHON" -m infir2.ray_launch --actor-num-nodes "$NODES" --actor-num-gpus-per-node "$GPUS_PER_NODE"
        --cwd "$PWD" "${LAUNCH_ARGS[@]}" -- "$@"
    )
    if [[ $RAY == http* ]]; then submit "${command[@]}"; else run "${command[@]}"; fi
}

# run_driver_on_ray MODULE FLAG...: start a module that places its own workers.
run_driver_on_ray() {
    local command=("$PYTHON" -m "$@")
    if [[ $RAY == http* ]]; then submit "${command[@]}"; else RAY_ADDRESS=$RAY run "${command[@]}"; fi
}

# submit WORD...: the command as a Ray job: its log here, its failure ours, Ctrl-C stops it.
submit() {
    local ray=${PYTHON%/*}/ray job=${SUBMISSION_ID:-$NAME-$(date +%Y%m%d-%H%M%S)} environment status=0
    [[ -x $ray ]] || ray=ray
    environment=$("$PYTHON" -m infir2.ray_cluster runtime-env) || exit 2
    if [[ -n ${RAY_AUTH_TOKEN:-} || -f ${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token} ]]; then
        export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} # Ray's commands send no token unless told to
    fi
    local command=(
        "$ray" job submit --address "$RAY" --submission-id "$job" --runtime-env-json "$environment" -- "$@"
    )
    announce "${command[@]}" || return 0
    without_proxy "$RAY"
    # In the background, so that a signal is handled at once: bash would wait for a command in the foreground.
    trap 'stop_job "$ray" "$job" 130' INT
    trap 'stop_job "$ray" "$job" 143' TERM
    "${command[@]}" &
    wait $! || status=$?
    if ((status == 0)); then confirm_success "$ray" "$job"; fi
    exit "$status"
}

# without_proxy URL: a cluster is not behind the web's proxy. Clients read one of the two names.
without_proxy() {
    local host=${1#*://}
    host=${host%%/*} host=${host%:*}
    host=${host#[} host=${host%]}
    export no_proxy="$host${no_proxy:+,$no_proxy}" NO_PROXY="$host${NO_PROXY:+,$NO_PROXY}"
}

# confirm_success RAY JOB: `ray job submit` also ends with 0 when the job was stopped, or the log's connection cut.
confirm_success() {
    local answer
    answer=$("$1" job status --address "$RAY" "$2" 2>&1) || true
    [[ $answer == *succeeded* ]] || die "job $2 did not succeed: ${answer##*$'\n'}"
}

# stop_job RAY JOB STATUS
stop_job() {
    trap '' INT TERM
    log "stopping job $2"
    "$1" job stop --address "$RAY" "$2" >&2 || log "could not stop it: ray job stop --address $RAY $2"
    exit "$3"
}
