#!/usr/bin/env bash
# Packs what scripts/gpu_check.sh needs beside PyTorch, ONNX and pytest, for a bare machine with Python 3.12 but no pip:
#   bash scripts/gpu_pack.sh            here; makes build/gpu_pack/1.part, 2.part, … of at most 40 MiB
#   PACK=build/gpu_pack bash scripts/gpu_check.sh device --work DIR     there, with the parts and this project
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/gpu_pack
version=${TENSORRT_RTX:-$(sed -n 's/^tensorrt-rtx==//p' scripts/constraints.txt)}
rm -rf "$out" && mkdir -p "$out/wheels" "$out/site"
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" -d "$out/wheels" "tensorrt-rtx-cu13-bindings==$version" "tensorrt-rtx-cu13-libs==$version"
python3 -m pip download --quiet --no-deps -d "$out/wheels" polygraphy "tensorrt-rtx-cu13==$version"
tar -C "$out/site" -xzf "$out"/wheels/tensorrt_rtx_cu13-*.tar.gz --strip-components=1 --wildcards '*/tensorrt_rtx/*'
for wheel in "$out"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$out/site"; done
tar -C "$out/site" -c . | xz -T1 --x86 --lzma2=preset=6,dict=64MiB | split -b 40M -d --additional-suffix=.part - "$out/"
rm -rf "$out/wheels" "$out/site"
ls -l "$out"
