#!/usr/bin/env bash
# The checks and measurements that need an NVIDIA GPU; writes docs/benchmarks/gpu_*.json.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
python scripts/gpu_check.py "$@"
