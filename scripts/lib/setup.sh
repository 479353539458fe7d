# shellcheck shell=bash
# Set-up for quickstart.sh and test.sh: a Python 3.12 or newer, .venv, the exact pins. Source it, call set_up.
# The second call does nothing: a stamp in .venv holds the hash of what was installed. SET_UP=0 takes PYTHON, or the
# python on PATH, as it is: in a container, or with a cluster's module, that has everything.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

VENV=$REPO_ROOT/.venv

set_up() {
    [[ ${SET_UP:-1} != 0 ]] || return 0
    local requirements=("$REPO_ROOT/requirements.txt") stamp
    if (($(gpu_count) > 0)); then requirements+=("$REPO_ROOT/requirements-gpu.txt"); fi
    stamp=$(cat "${requirements[@]}" "$REPO_ROOT/pyproject.toml" | cksum)
    if [[ -x $VENV/bin/python && -f $VENV/infir2-stamp && $(<"$VENV/infir2-stamp") == "$stamp $REPO_ROOT" ]]; then
        PYTHON=$VENV/bin/python
        return
    fi
    local base
    base=$(find_python) || die "no Python 3.12 or newer with venv found; install one (for example 'apt install \
python3.12-venv' or 'uv python install 3.12'), or set PYTHON to it"
    log "set-up with $base: about 7 GB into .venv"
    make_venv "$base"
    install "${requirements[@]}"
    echo "$stamp $REPO_ROOT" >"$VENV/infir2-stamp"
    PYTHON=$VENV/bin/python
}

# find_python: print a Python that runs, is at least 3.12 and can make environments. A shim that fails is passed over.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.13 python3.14 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python "$HOME"/.local/share/uv/python/*/bin/python3; do
        [[ -n $candidate && $candidate != "$VENV"/* ]] || continue
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

# make_venv PYTHON: a fresh environment; one that was cut off or made by another Python is replaced.
make_venv() {
    rm -f "$VENV/infir2-stamp"
    if [[ -x $VENV/bin/python ]] && "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
        return
    fi
    "$1" -m venv --clear "$VENV"
}

# install FILE...: uv where it can be had (about 30 s), else pip. The package itself is installed in place.
install() {
    local file
    local -a isolation installer=("$VENV/bin/python" -m pip install --disable-pip-version-check)
    if "${installer[@]}" --quiet uv >/dev/null 2>&1; then
        installer=("$VENV/bin/uv" pip install --python "$VENV/bin/python")
    fi
    for file in "$@"; do
        isolation=()
        if [[ $file == *-gpu.txt ]]; then isolation=(--no-build-isolation); fi # it compiles against our torch
        "${installer[@]}" "${isolation[@]}" -r "$file" ||
            die "installing $file failed; the lines above say why"
    done
    "${installer[@]}" --no-deps --editable "$REPO_ROOT" || die "installing the package infir2 failed"
}
