#!/usr/bin/env bash
# Lint, types and all tests, the fast ones first. Needs no GPU and no TensorRT.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
ruff check .
ruff format --check .
mypy engines export runtime scripts tests
python -m pytest -q --durations=8 tests
