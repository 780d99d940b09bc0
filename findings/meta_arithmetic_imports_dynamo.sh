#!/usr/bin/env bash
# Adding two tensors on the meta device imports torch's compiler.
#
# Expected: the meta device exists so that shapes can be worked out for nothing. torch.empty, views and copy_ there do
# cost nothing, so a program that checks the sizes of a model before it reads any weights seems free to build it there.
# Seen: the first arithmetic on the meta device (x + 1) goes through torch's Python references, whose output wrapper
# imports torch._dynamo with all of its tracing: hundreds of modules and some seconds, more than loading a small model.
# torch.arange with a float dtype does the same.
# Source: torch 2.13.0, torch/_prims_common/wrappers.py and torch/_compile.py. What to do: keep arithmetic (position
# tables, say) off the meta device; empty tensors of the right size are enough.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

x = torch.empty(4, 3, device="meta")
x[:2].copy_(torch.empty(2, 3, device="meta"))
before = set(sys.modules)
print("after empty and copy_: torch._dynamo imported:", "torch._dynamo" in before)
assert "torch._dynamo" not in before
x + 1
new = set(sys.modules) - before
print("after x + 1:           torch._dynamo imported:", "torch._dynamo" in new, "with", len(new), "modules in all")
assert "torch._dynamo" in new and len(new) > 100
PYTHON
