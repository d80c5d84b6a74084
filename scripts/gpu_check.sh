#!/usr/bin/env bash
# Settle on a machine with an NVIDIA GPU what cannot be settled without one; writes docs/benchmarks/gpu_*.json.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
python scripts/gpu_check.py "$@"
