#!/usr/bin/env bash
# The oldest versions that pyproject.toml allows, in a virtual environment of their own: a few tests of building,
# running and drawing. PyTorch comes in the version of scripts/constraints.txt, since its oldest brings gigabytes;
# `TORCH=2.6.0 bash scripts/test_oldest.sh` takes that. Options go to pytest.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
oldest=.venv/oldest
stamp=$(cat pyproject.toml scripts/constraints.txt scripts/test_oldest.sh | sha256sum)${TORCH:-}
if [ "$(cat $oldest/installed 2>/dev/null)" != "$stamp" ]; then
    echo "setting up $oldest"
    "${PYTHON:-python3.11}" -m venv --clear $oldest
    python - >$oldest/requirements.txt <<'PYTHON'
import os
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
for needed in (*project["dependencies"], *(line for name in ("export", "cpu", "vision", "plot") for line in extras[name])):
    if not needed.startswith("torch>"):
        print(needed.replace(">=", "=="))
with open("scripts/constraints.txt", encoding="utf-8") as file:
    tested = re.search(r"^torch==(.*)$", file.read(), re.MULTILINE)
print(f"torch=={os.environ.get('TORCH') or tested[1]}")
PYTHON
    $oldest/bin/python -m pip install --quiet --disable-pip-version-check \
        -r $oldest/requirements.txt pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.15
    echo "$stamp" >$oldest/installed
fi
$oldest/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow" -W default \
    tests/engines/test_model.py tests/engines/ort tests/export/test_part.py tests/export/compilers/test_onnxruntime.py \
    tests/export/verify tests/parity tests/runtime/test_text.py tests/runtime/bench "$@"
