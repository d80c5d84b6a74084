"""Whether ONNX Runtime's CUDA provider takes the exported graphs, node by node; no GPU and no CUDA are needed.

    pip download --no-deps onnxruntime-gpu==1.27.0 && unzip -d release onnxruntime_gpu-*.whl
    python -m scripts.cuda_provider release bundles/demo

The provider of an unpacked wheel opens every graph with `session.disable_cpu_ep_fallback`, as the back end does. The
libraries of CUDA that it links are replaced by stubs, compiled with the machine's C compiler, whose functions do
nothing but succeed: sessions open and nodes find their kernels, but nothing can run. Prints a line of JSON for each
graph: the operators without a kernel, and those that the provider leaves to the CPU although it has one.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
HEADER = "#include <stdlib.h>\n#include <string.h>\n"
# What must do more than succeed: the answers to questions, and memory. The offsets in the properties of a device are
# those of CUDA 12 and 13: memory, shared memory, registers, warp, threads of a block, capability, processors.
BODIES = {
    "cudaGetDevice": "(int *a) { *a = 0; return 0; }",
    "cudaGetDeviceCount": "(int *a) { *a = 1; return 0; }",
    "cudaGetDeviceProperties": """(char *p) {
        for (int i = 344; i < 1000; i += 4) *(int *)(p + i) = 2048;
        *(size_t *)(p + 288) = 80UL << 30; *(size_t *)(p + 296) = 49152; *(int *)(p + 304) = 65536;
        *(int *)(p + 308) = 32; *(int *)(p + 320) = 1024; *(int *)(p + 360) = 8; *(int *)(p + 364) = 9; return 0; }""",
    "cudaDeviceGetAttribute": "(int *a) { *a = 100; return 0; }",
    "cudaDriverGetVersion": "(int *a) { *a = 13000; return 0; }",
    "cudaRuntimeGetVersion": "(int *a) { *a = 13000; return 0; }",
    "cudaMemGetInfo": "(size_t *a, size_t *b) { *a = *b = 80UL << 30; return 0; }",
    "cudaMalloc": "(void **p, size_t n) { *p = aligned_alloc(256, (n + 256) / 256 * 256); return 0; }",
    "cudaMallocHost": "(void **p, size_t n) { *p = malloc(n); return 0; }",
    "cudaHostAlloc": "(void **p, size_t n) { *p = malloc(n); return 0; }",
    "cudaFree": "(void *p) { free(p); return 0; }",
    "cudaFreeHost": "(void *p) { free(p); return 0; }",
    "cudaMemcpy": "(void *a, void *b, size_t n) { memcpy(a, b, n); return 0; }",
    "cudaMemcpyAsync": "(void *a, void *b, size_t n) { memcpy(a, b, n); return 0; }",
    "cudaMemset": "(void *a, int v, size_t n) { memset(a, v, n); return 0; }",
    "cudaMemsetAsync": "(void *a, int v, size_t n) { memset(a, v, n); return 0; }",
}
BODIES["cudaGetDeviceProperties_v2"] = BODIES["cudaGetDeviceProperties"]
HANDLE = re.compile(r"cu\w*Create\w*")  # functions that make something: their first argument takes its address
POINTER = {"cudaGetErrorString", "cudaGetErrorName", "__cudaRegisterFatBinary"}  # functions that return an address
NO_KERNEL = re.compile(r"CUDA kernel not found in registries for Op type: (\w+)")
LEFT = re.compile(r"Force fallback to CPU execution for node: (\w+)")


def function(name: str) -> str:
    """The C source of a stub."""
    if name in POINTER:
        return f'void *{name}() {{ return "stub"; }}\n'
    if name not in BODIES and HANDLE.fullmatch(name):
        return f"int {name}(void **p) {{ *p = malloc(4096); return 0; }}\n"
    return f"int {name}{BODIES.get(name, '() { return 0; }')}\n"


def make_stubs(provider: Path, folder: Path) -> None:
    """Compile a stub of each CUDA library that `provider` links, with the functions that it takes from it."""

    def lines(*command: object) -> list[str]:
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout.splitlines()

    libraries = re.findall(r"\[(lib(?:cu|nv)[^\]]*)\]", "\n".join(lines("readelf", "-d", provider)))
    symbols = [line.split()[-1] for line in lines("nm", "-D", "--undefined-only", provider)]
    for library in libraries:
        # Functions of the driver have no version; all others have the name of their library.
        own = [name.partition("@")[0] for name in symbols if name.endswith(f"@{library}")]
        own += [name for name in symbols if library == "libcuda.so.1" and re.fullmatch("cu[A-Z][A-Za-z]*", name)]
        (folder / "stub.c").write_text(HEADER + "".join(map(function, sorted(set(own)))), encoding="utf-8")
        (folder / "stub.map").write_text(f"{library} {{ global: *; }};", encoding="utf-8")
        flags = "-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", f"-Wl,--version-script={folder}/stub.map"
        subprocess.run(["cc", *flags, "-o", folder / library, folder / "stub.c"], check=True)


def place(graph: Path) -> dict[str, object]:
    """Open a graph with the provider: whether that succeeds, operators without a kernel, nodes left to the CPU."""
    import onnxruntime as ort  # of the release: the process was started for it

    options = ort.SessionOptions()
    options.log_severity_level = 0
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    with tempfile.TemporaryFile() as log:  # written by the library itself
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            session = ort.InferenceSession(str(graph), options, providers=["CUDAExecutionProvider"])
            opened = session.get_providers()[0] == "CUDAExecutionProvider"
        except Exception as error:
            opened = False
            if "explicitly disabled" not in str(error):
                raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        log.seek(0)
        text = log.read().decode(errors="replace")
    if not opened and (failed := re.search(r"Failed to load library (.*)", text)):
        raise SystemExit(f"the provider of this release does not load: {failed[1]}")
    missing = Counter(NO_KERNEL.findall(text))
    return {"graph": str(graph), "opened": opened, "no_kernel": missing, "left_to_the_cpu": LEFT.findall(text)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whether ONNX Runtime's CUDA provider takes the exported graphs.")
    parser.add_argument("release", type=Path, help="folder of an unpacked wheel of onnxruntime-gpu")
    parser.add_argument("bundles", nargs="+", type=Path, help="folders of bundles")
    args = parser.parse_args(argv)
    if "CUDA_STUBS" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            make_stubs(args.release / PROVIDER, Path(folder))
            paths = os.pathsep.join([str(args.release.resolve()), *sys.path])
            started = {"LD_LIBRARY_PATH": folder, "PYTHONPATH": paths, "CUDA_STUBS": folder}
            return subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=os.environ | started).returncode
    rows = [place(graph) for bundle in args.bundles for graph in sorted((bundle / "onnx").glob("*.onnx"))]
    for row in rows:
        print(json.dumps(row))
    return 0 if rows and all(row["opened"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
