#!/usr/bin/env bash
# The checks and measurements that need an NVIDIA GPU; writes docs/benchmarks/gpu_*.json. See scripts/gpu_check.py.
# With PACK=DIR it takes its packages from there, as scripts/gpu_pack.sh made it, and installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${PACK:-}" ]; then
    site=${SITE:-/tmp/elastic-site}
    if [ ! -d "$site" ]; then
        cat "$PACK"/*.part | python3 -c 'import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1], filter="data")' "$site.new"
        mv "$site.new" "$site"
    fi
    export PYTHONPATH="$site:$PWD"
else
    . scripts/setup.sh
fi
python3 -m scripts.gpu_check "$@"
