"""The stubs of CUDA's libraries, with which `scripts/cuda_provider.py` asks ONNX Runtime's provider for its kernels."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.cuda_provider import BODIES, LEFT, NO_KERNEL, function, make_stubs


def test_the_log_is_read() -> None:
    log = (
        "[I:onnxruntime:, x.cc:1 GetCapability] CUDA kernel not found in registries for Op type: Cast node name: a\n"
        "[I:onnxruntime:, y.cc:2 GetCpuPreferredNodes] Force fallback to CPU execution for node: b_20 because\n"
    )
    assert NO_KERNEL.findall(log) == ["Cast"] and LEFT.findall(log) == ["b_20"]


def test_functions() -> None:
    """Most do nothing but succeed; what makes something gives its address."""
    assert function("cublasSetStream_v2") == "int cublasSetStream_v2() { return 0; }\n"
    assert "malloc" in function("cublasCreate_v2") and "*a = 1" in function("cudaGetDeviceCount")
    assert function("cudaGetErrorString").startswith("void *")


@pytest.mark.skipif(
    not all(map(shutil.which, ("cc", "nm", "readelf"))), reason="stubs are compiled with cc, and need nm and readelf"
)
def test_a_library_that_links_the_stubs(tmp_path: Path) -> None:
    """They have the names and versions that a provider asks for, and their memory can be written."""
    (tmp_path / "real.c").write_text("".join(f"int {name}() {{ return 7; }}\n" for name in BODIES))
    (tmp_path / "real.map").write_text("libcudart.so.13 { global: *; };")
    (tmp_path / "provider.c").write_text(
        "int cudaMalloc(void **, unsigned long); int cudaGetDeviceCount(int *);"
        "int ask(void) { char *p; cudaMalloc((void **)&p, 1000); p[999] = 1;"
        "int n = 0; cudaGetDeviceCount(&n); return n; }"
    )
    real, provider, stubs = tmp_path / "libcudart.so.13", tmp_path / "provider.so", tmp_path / "stubs"
    stubs.mkdir()
    shared = "cc", "-shared", "-fPIC", "-w"
    soname = f"-Wl,-soname,{real.name}", f"-Wl,--version-script={tmp_path}/real.map"
    subprocess.run([*shared, *soname, "-o", real, tmp_path / "real.c"], check=True)
    subprocess.run([*shared, "-o", provider, tmp_path / "provider.c", real], check=True)
    make_stubs(provider, stubs)
    ctypes.CDLL(str(stubs / real.name), ctypes.RTLD_GLOBAL)
    assert ctypes.CDLL(str(provider)).ask() == 1
