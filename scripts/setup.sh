# Sourced by demo.sh and test.sh: an up-to-date .venv with this package in it. Silent when there is nothing to do.
#
#   setup_venv [EXTRAS]    EXTRAS: "" or a pip extras list such as "dev"
#
# PYTHON chooses the interpreter (default: the first of python3, python3.13, python3.12, python3.11 that is 3.11 or newer).

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PIP_DISABLE_PIP_VERSION_CHECK=1

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3" >&2
    return 1
}

run_logged() {
    if ! "$@" >>.venv/setup.log 2>&1 </dev/null; then
        echo "error: '$*' failed; the end of .venv/setup.log:" >&2
        tail -n 25 .venv/setup.log >&2
        return 1
    fi
}

setup_venv() {
    local extras="${1:-}" target="." stamp fingerprint python
    local -a constraints=()
    [ -z "$extras" ] || target=".[$extras]"
    command -v nvidia-smi >/dev/null 2>&1 || constraints=(--constraint scripts/constraints.txt)

    if [ ! -x .venv/bin/python ]; then
        python=$(find_python) || return 1
        echo "setup: creating .venv with $("$python" --version)" >&2
        if ! "$python" -m venv .venv; then
            echo "error: '$python -m venv .venv' failed; on Debian and Ubuntu install python3-venv" >&2
            rm -rf .venv
            return 1
        fi
    fi

    stamp=".venv/setup-${extras:-base}.stamp"
    fingerprint=$(cat pyproject.toml scripts/constraints.txt | cksum; pwd; echo "${constraints[*]-}")
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$fingerprint" ]; then
        echo "setup: installing nanovllm and what it needs into .venv (the first time takes minutes) ..." >&2
        run_logged .venv/bin/python -m pip install --editable "$target" ${constraints[@]+"${constraints[@]}"} || return 1
        echo "$fingerprint" >"$stamp"
    fi
}
