#!/usr/bin/env bash
# Ray Data's read_parquet reads a folder of small files into one block, whatever override_num_blocks says.
#
# Expected: "override_num_blocks: Override the number of output blocks from all read tasks", as read_json and range do.
# Seen: twelve files and override_num_blocks=12 give one block. What follows takes it as one task: a stateful map runs
# on a single actor, and a job with a CheckpointConfig has nothing that it could go on from before that task's output
# reaches target_max_block_size (128 MiB) or its end, however many rows are done.
# Source: ray 2.60.0, `use_datasource_v2` in ray/data/context.py, which is on: that reader sizes blocks by bytes, and
# read_parquet hands it no number. A smaller DataContext.target_max_block_size gives more blocks and checkpoints.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ray[data]==2.60.0"
cat >"$folder/look.py" <<'PYTHON'
import os
import sys

import ray

ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
import ray.data

context = ray.data.DataContext.get_current()
context.enable_progress_bars = False
folder = sys.argv[1]
ray.data.range(48, override_num_blocks=12).write_parquet(folder)
print(len(os.listdir(folder)), "files, use_datasource_v2:", context.use_datasource_v2)
seen = {}
for is_new in (True, False):
    context.use_datasource_v2 = is_new
    seen[is_new] = ray.data.read_parquet(folder, override_num_blocks=12).materialize().num_blocks()
    print(f"read with override_num_blocks=12 and use_datasource_v2={is_new}: {seen[is_new]} blocks")
assert seen == {True: 1, False: 12}
PYTHON
RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" "$folder/look.py" "$folder/rows" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
