#!/usr/bin/env bash
# The checks and measurements that need an NVIDIA GPU; writes docs/benchmarks/gpu_*.json. See scripts/gpu_check.py.
# With PACK=DIR it takes its packages from there, as scripts/gpu_pack.sh made it, and installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${PACK:-}" ]; then
    site=${SITE:-/tmp/elastic-site}
    [ -d "$site" ] || { mkdir -p "$site.part" && cat "$PACK"/*.part | tar -xJ -C "$site.part" && mv "$site.part" "$site"; }
    export PYTHONPATH="$site:$PWD"
else
    . scripts/setup.sh
fi
python3 -m scripts.gpu_check "$@"
