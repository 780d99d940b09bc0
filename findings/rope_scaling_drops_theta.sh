#!/usr/bin/env bash
# A stretch added to a config.json that transformers 5 wrote replaces the base frequency, too.
#
# Expected: model cards say how to stretch a model for long inputs: add "rope_scaling": {"rope_type": "yarn", "factor": 4,
# "original_max_position_embeddings": 32768} to config.json. The base (rope_theta) has nothing to do with that and stays.
# Seen: transformers 5 writes rope_theta inside "rope_parameters". Read again, "rope_scaling" does not add to that object,
# it takes its place; rope_theta then is the class's 10,000, without a word, where the model was trained with 1,000,000.
# In a config.json of transformers 4, with rope_theta beside rope_scaling, the same edit keeps it.
# Source: transformers 5.24.0, modeling_rope_utils.py, convert_rope_params_to_dict. What to do: repeat rope_theta inside
# rope_scaling; a reader that follows transformers should warn where the two differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

from transformers import AutoConfig, Qwen3Config

stretch = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def theta_with(edit: dict, new: bool) -> float:
    folder = Path(sys.argv[1])
    Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if not new:  # as transformers 4 wrote it
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps({**config, **edit}))
    return AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"]


print("as written by transformers 5:        rope_theta", theta_with({}, new=True))
print("with rope_scaling added:             rope_theta", theta_with({"rope_scaling": stretch}, new=True))
print("the same in transformers 4's format: rope_theta", theta_with({"rope_scaling": stretch}, new=False))
assert theta_with({}, new=True) == 1e6
assert theta_with({"rope_scaling": stretch}, new=True) == 1e4
assert theta_with({"rope_scaling": stretch}, new=False) == 1e6
PYTHON
