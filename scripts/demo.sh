#!/usr/bin/env bash
# From a bare clone to answers: set up, build the demo bundle, answer three held-out problems in three ways.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
python -m export build
python scripts/demo.py
