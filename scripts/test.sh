#!/usr/bin/env bash
# Lint, types, all tests and their coverage. Needs no GPU and no TensorRT.
# Options go to pytest: `bash scripts/test.sh -m "not slow"` runs the fast suite.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
ruff check .
ruff format --check .
mypy engines export runtime scripts tests
# A process a core: a model of the tests runs on one thread. By file, since fixtures of a file would be built twice.
python -m pytest -q -n 2 --dist loadfile --durations=20 --durations-min=1 --cov --cov-report= "$@"
echo "coverage of engines, export and runtime: $(python -m coverage report --format=total) %" \
    "(lines and branches; \`python -m coverage report --skip-covered\` prints it by file)"
