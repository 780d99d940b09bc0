#!/usr/bin/env bash
# Generate text with the demo model. Sets up everything it needs in .venv; arguments go to `nanovllm demo`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_venv
exec .venv/bin/nanovllm demo "$@"
