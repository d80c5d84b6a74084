"""The default number of threads: OMP_NUM_THREADS, affinity, the quotas of control groups, and what is free."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines import cores
from engines.cores import allowed_cores, default_threads, free_cores, quota
from tests.support.cases import ROOT


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of 8 cores without control groups, of which all are free; its folder of control groups."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "free_cores", lambda allowed: allowed)
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "groups")
    monkeypatch.delenv("OMP_NUM_THREADS")
    return tmp_path / "groups"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# OMP_NUM_THREADS and affinity


@pytest.mark.parametrize(
    ("value", "threads"),
    [("1", 1), ("3", 3), ("3,2", 3), ("8", 8), ("99", 8), ("", 7), ("0", 7), ("-1", 7), ("many", 7), (None, 7)],
)  # fmt: skip
def test_omp_num_threads(value: str | None, threads: int, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OMP_NUM_THREADS where it is a number, as far as there are cores; else all cores but one."""
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_threads() == threads


@pytest.mark.parametrize(("cpus", "threads"), [({0}, 1), ({5}, 1), ({0, 5}, 1), ({2, 3, 6}, 2)])
def test_affinity(cpus: set[int], threads: int, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus)
    assert allowed_cores() == len(cpus) and default_threads() == threads


# Quotas


@pytest.mark.parametrize(
    ("text", "cores", "threads"),
    [("max 100000", 8, 7), ("400000 100000", 4, 3), ("350000 100000", 3, 2), ("150000 100000", 1, 1),
     ("50000 100000", 1, 1), ("1600000 100000", 8, 7)],
)  # fmt: skip
def test_a_quota_of_version_2(text: str, cores: int, threads: int, machine: Path) -> None:
    write(machine.parent / "membership", "0::/pod/box\n")
    write(machine / "pod/box/cpu.max", f"{text}\n")
    assert (allowed_cores(), default_threads()) == (cores, threads)


@pytest.mark.parametrize(("microseconds", "cores"), [("-1", 8), ("100000", 1), ("300000", 3), ("50000", 1)])
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_a_quota_of_version_1(microseconds: str, cores: int, controllers: str, machine: Path) -> None:
    write(machine.parent / "membership", f"4:memory:/other\n3:{controllers}:/box\n0::/\n")
    write(machine / controllers / "box/cpu.cfs_quota_us", f"{microseconds}\n")
    write(machine / controllers / "box/cpu.cfs_period_us", "100000\n")
    assert allowed_cores() == cores


def test_the_group_above_limits_too(machine: Path) -> None:
    write(machine.parent / "membership", "0::/pod/box\n")
    write(machine / "pod/cpu.max", "200000 100000\n")
    write(machine / "pod/box/cpu.max", "600000 100000\n")
    assert quota() == 2.0


def test_the_path_of_the_host_in_a_container(machine: Path) -> None:
    """/proc names the group as the host does; what is mounted in the container begins at the group itself."""
    write(machine.parent / "membership", "1:cpu:/docker/0123abcd\n")
    write(machine / "cpu/cpu.cfs_quota_us", "200000\n")
    write(machine / "cpu/cpu.cfs_period_us", "100000\n")
    write(machine.parent / "cpu.max", "100000 100000\n")  # outside of the mount: no group
    assert quota() == 2.0


@pytest.mark.parametrize("text", ["", "max\n", "100000 period\n"])
def test_a_file_that_is_no_quota_limits_nothing(text: str, machine: Path) -> None:
    write(machine.parent / "membership", "0::/box\n")
    write(machine / "box/cpu.max", text)
    assert quota() is None


def test_no_control_groups(machine: Path) -> None:
    assert quota() is None and default_threads() == 7


# What is free


@pytest.mark.parametrize(("free", "threads"), [(8, 7), (5, 4), (2, 1), (1, 1)])
def test_what_is_not_free_is_not_used(free: int, threads: int, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that sees all cores of its host and gets two."""
    monkeypatch.setattr(cores, "free_cores", lambda allowed: free)
    assert default_threads() == threads


@pytest.mark.parametrize(
    ("busy", "free", "measured"), [(4.0, 4, 1), (3.8, 4, 1), (1.0, 1, 3), (2.0, 2, 3), (0.4, 1, 3), (4.6, 4, 1)]
)
def test_measuring(busy: float, free: int, measured: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU time that four threads get; it is measured again where some is missing."""
    taken: list[int] = []

    def busy_cores(threads: int) -> float:
        taken.append(threads)
        return busy

    monkeypatch.setattr(cores, "_busy_cores", busy_cores)
    assert free_cores(4) == free and taken == [4] * measured


def test_no_more_cores_than_there_are() -> None:
    """32 threads on this machine, whatever else runs."""
    assert 1 <= free_cores(32) <= (os.cpu_count() or 1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "eager"])
def test_both_back_ends_take_the_default(golden_bundle: Path, backend: str) -> None:
    """In a process of its own, for ONNX Runtime makes its pool once."""
    code = "import runtime, sys; print(runtime.load(sys.argv[1], sys.argv[2]).model.device)"
    found = subprocess.run(
        [sys.executable, "-c", code, str(golden_bundle), backend],
        cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "CPU, 1 threads" in found.stdout
