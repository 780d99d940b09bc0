#!/usr/bin/env bash
# Triton 3.9.0's interpreter refuses a mask that the compiler and earlier interpreters take: a condition on a scalar `&` a
# condition on a vector.
#
# Expected: TRITON_INTERPRET=1 runs what the compiler compiles (documentation, "Debugging Triton", section "Using the
# Interpreter"), so that `tl.store(ptr + i, 1, mask=(i < 8) & (n > 0))` stores eight times, as it does on a GPU and up to 3.8.
# Seen in 3.9.0: ValueError('mask has unsupported dtype'). A comparison leaves its operands' type, int32, on its handle, and
# splatting the scalar one makes integers of it, so that the mask is one of integers (triton/runtime/interpreter.py,
# `binary_op` and `create_splat`, the same as in 3.8); new in 3.9 is that loads and stores look at the mask's type.
# A way round: compare vectors only, or put the scalar condition into an `if`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/scalar_condition.py" <<'PYTHON'
import numpy as np
import triton
import triton.language as tl


@triton.jit
def fill(address, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(address.to(tl.pointer_type(tl.int32)) + i, 1, mask=(i < 8) & (n > 0))


out = np.zeros(16, np.int32)
try:
    fill[(1,)](out.ctypes.data, 5, SIZE=16)
    print(triton.__version__, "stored", out.sum())
except Exception as error:
    print(triton.__version__, "refused:", error.__cause__ or error)
PYTHON
for version in 3.8.0 3.9.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "triton==$version" numpy
    TRITON_INTERPRET=1 "$folder/$version/bin/python" "$folder/scalar_condition.py" | tee -a "$folder/seen"
done
diff "$folder/seen" - <<'SEEN'
3.8.0 stored 8
3.9.0 refused: mask has unsupported dtype
SEEN
