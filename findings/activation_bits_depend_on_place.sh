#!/usr/bin/env bash
# On a CPU, the bits of torch.sigmoid, silu and gelu of one number depend on where in a tensor it stands.
#
# Expected: a function of single numbers gives a number the same result alone and among others, as exp and tanh do here.
# So a row of activations should not depend on how many other rows a batch has.
# Seen: whole vectors of the processor go through a vectorized form, what is left at a tensor's end through a scalar one,
# and for sigmoid, silu and gelu the two round differently for some per cent of all numbers. In a batch of another size
# the end falls elsewhere, so a sequence can get other last bits: enough to turn a greedy token where two are near each
# other, and a router's choice of experts.
# Source: torch 2.13.0, `cpu_kernel_vec` in aten/src/ATen/native/cpu/Loops.h and its callers. What to do where bits must
# not depend on the batch: compute row by row, or pad the flat tensor to whole vectors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import torch
from torch.nn import functional

x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
print("vectors:", torch.backends.cpu.get_cpu_capability())
differ = {}
for function in (torch.exp, torch.tanh, torch.sigmoid, functional.silu, functional.gelu):
    alone = torch.cat([function(x[i : i + 1]) for i in range(1024)])
    differ[function.__name__] = int((function(x)[:1024] != alone).sum())
    print(f"{function.__name__:8} of 1,024 numbers, with other bits alone than among 4,096: {differ[function.__name__]}")
assert differ["exp"] == differ["tanh"] == 0
assert all(differ[name] > 0 for name in ("sigmoid", "silu", "gelu"))
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
ATEN_CPU_CAPABILITY=avx2 "$folder/venv/bin/python" "$folder/look.py"
