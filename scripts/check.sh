#!/usr/bin/env bash
# The long checks before a release: parity on many models and prompts, then builds that are killed and resumed.
# Options go to scripts/check.py; the figures are written to docs/checks/parity.json.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
python scripts/check.py "$@"
KILL_BUILDS=20 python -m pytest tests/export/test_build.py -k kill
