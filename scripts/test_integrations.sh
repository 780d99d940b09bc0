#!/usr/bin/env bash
# Run programs that are written for vLLM on this engine, and clients of many kinds against its server, in the versions
# that pip finds. They bring many packages, so .venv, which this shares with test.sh, gets them only when asked for.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_venv dev,integrations || exit 1
.venv/bin/python -m pytest -m integrations tests/integrations tests/server/test_page.py "$@"
