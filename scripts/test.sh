#!/usr/bin/env bash
# Run every check: style, types, import rules, all tests (Triton kernels in the interpreter where there is no GPU).
# Sets up everything it needs in .venv. Arguments go to pytest (`bash scripts/test.sh tests/engine -x`), which then is the
# only test run after style, types and import rules.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_venv dev
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false

quietly() {
    local title=$1 output
    shift
    if output=$("$@" 2>&1 </dev/null); then
        echo "$title: ok"
    else
        printf '%s\n%s: FAILED\n' "$output" "$title"
        return 1
    fi
}

quietly "ruff check" ruff check .
quietly "ruff format" ruff format --check .
quietly "mypy" mypy
quietly "import rules" lint-imports
if [ $# -eq 0 ]; then
    quietly "validation under python -O" python -O -m pytest -q -m "not slow and not demo_model" \
        tests/test_config.py tests/test_sampling_params.py tests/test_llm.py
    if ! command -v nvidia-smi >/dev/null 2>&1; then
        quietly "kernels in Triton's interpreter" env TRITON_INTERPRET=1 python -m pytest -q tests/kernels tests/runner
    fi
fi
exec python -m pytest "$@" </dev/null
