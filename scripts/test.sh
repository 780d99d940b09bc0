#!/usr/bin/env bash
# Run every check: style, types, import rules, all tests (Triton kernels in the interpreter where there is no GPU).
# Sets up everything it needs in .venv.
#
#   bash scripts/test.sh               all of it, as CI does
#   bash scripts/test.sh --fast        what tells most in two minutes
#   bash scripts/test.sh ARGUMENTS...  style, types, import rules and `pytest ARGUMENTS`, for example tests/engine -x
#
# All stages run, also behind one that fails; the summary at the end names it.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_venv dev || exit 1
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false
trap 'kill $types $rules 2>/dev/null; exit 130' INT

# Beside the tests, of which now and then one waits; their stages are the last.
mypy </dev/null >.venv/types.log 2>&1 &
types=$!
lint-imports </dev/null >.venv/rules.log 2>&1 &
rules=$!

num_workers=$(python -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')
tests=(env OMP_NUM_THREADS=1 python -m pytest -q -n "$num_workers" --dist worksteal) # a process per core, a thread in each
# Left out of the fast ones: other processes, a server, Hugging Face's models beside ours, kernels, commands, long matrices, and
# what stands in rooms of its own (drafts, adapters, new weights, fewer bits).
fast=(-m "not slow and not demo_model")
for left_out in models executor kernels bench cli batch demo integrations server weights/test_gguf_models.py \
    engine/test_interruptions.py test_data_parallel.py test_features_pairwise.py test_llm_deterministic.py \
    test_llm_equality.py test_llm_resources.py live lora rl quantization test_adapters.py test_llm_speculation.py \
    test_llm_draft_model.py test_llm_eagle3.py test_llm_dflash.py test_llm_kv_cache_dtype.py layers/test_rotary.py; do
    fast+=(--ignore="tests/$left_out")
done
interpreter=(tests/kernels/triton tests/runner/graphs/test_captured_steps.py)
narrow=(env ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell)
validation=(tests/test_config.py tests/test_sampling_params.py tests/test_llm.py)
to_the_bit=(tests/kernels/triton/batch_invariant tests/kernels/triton/test_moe.py)

summary=""
status=0

# stage TITLE COMMAND...: run it, and note for the summary how it went.
stage() {
    local title=$1 start=$SECONDS outcome=ok
    shift
    echo "== $title"
    "$@" </dev/null || outcome=FAILED
    [ $outcome = ok ] || status=1
    summary+=$(printf '%-6s %5d s  %s' $outcome $((SECONDS - start)) "$title")$'\n'
}

# ended PROCESS LOG: wait for what runs beside; what it said, and how it went.
ended() {
    wait "$1"
    local status=$?
    cat "$2"
    return $status
}

stage "style" ruff check .
stage "format" ruff format --check .
if [ $# -gt 0 ] && [ "$1" != --fast ]; then
    stage "tests" python -m pytest "$@"
elif [ $# -gt 0 ]; then
    stage "fast tests" "${tests[@]}" "${fast[@]}"
else
    stage "tests" "${tests[@]}"
    stage "without assertions" env PYTHONOPTIMIZE=1 "${tests[@]}" -m "not slow and not demo_model" "${validation[@]}"
    if ! command -v nvidia-smi >/dev/null 2>&1; then
        stage "kernels in Triton's interpreter" env TRITON_INTERPRET=1 "${tests[@]}" "${interpreter[@]}"
        stage "the same bits with AVX2 alone" "${narrow[@]}" env TRITON_INTERPRET=1 "${tests[@]}" "${to_the_bit[@]}"
    fi
fi
stage "types" ended $types .venv/types.log
stage "import rules" ended $rules .venv/rules.log

printf '\n%s' "$summary"
exit $status
