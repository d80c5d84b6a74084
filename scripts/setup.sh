# Sourced by the other scripts: a virtual environment in .venv with all that building, running and testing need; activated.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
    echo "error: Python 3.11 to 3.13 is needed; name one with PYTHON=/path/to/python" >&2
    exit 1
fi
stamp=$(cat pyproject.toml scripts/constraints.txt scripts/setup.sh | sha256sum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
    echo "setting up .venv"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt torch==2.13.0
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[rtx,dev]'
    echo "$stamp" >.venv/installed
fi
. .venv/bin/activate
