"""How many CPU cores this process gets, and the number of threads that follows from it.

Threads that wait for each other at every operator are slow where they do not
all run: two threads on a two-core machine that another process shares were
eleven times slower than one (docs/BENCHMARKS.md). So the default leaves one
core to others, and takes no core that is not there when it is measured.
"""

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
MEASURED = 0.02  # seconds of one measurement
TRIES = 3  # measurements at most: a short burst of another process does not count
SLACK = 0.25  # of a core, which a measurement may miss


def default_threads() -> int:
    """CPU threads where no number is given: OMP_NUM_THREADS, else one fewer than the free cores, but at least 1."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is for nested parallelism
    if wanted.isdecimal() and int(wanted) > 0:
        return min(int(wanted), os.cpu_count() or 1)
    allowed = allowed_cores()
    return 1 if allowed <= 2 else max(1, free_cores(allowed) - 1)


def allowed_cores() -> int:
    """Whole cores that this process may use, by its affinity and the quotas of its control groups; at least 1."""
    allowed = len(os.sched_getaffinity(0))
    limit = quota()
    return allowed if limit is None else max(1, min(allowed, int(limit)))


def quota() -> float | None:
    """The cores that control groups (version 1 or 2) allow this process on average; None without a limit.

    A group is limited by those above it, too. In a container the path of a group
    may be that of the host, of which only the upper end is mounted here.
    """
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None  # a system without control groups
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = CGROUPS / controllers
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (limit := _limit(folder)) is not None:
                found.append(limit)
    return min(found, default=None)


def _limit(group: Path) -> float | None:
    """The cores that one control group allows; None without a limit."""
    try:
        if (group / "cpu.max").exists():  # version 2: "max 100000" or "150000 100000"
            most, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            most, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
            )
        return int(most) / int(period) if most.isdecimal() else None  # version 1 has -1 for no limit
    except (OSError, ValueError):
        return None


def free_cores(allowed: int) -> int:
    """Measure how many of `allowed` cores work for this process now: the CPU time of as many busy threads.

    Takes about 20 ms, and about 60 ms where some are not free.
    """
    most = 0.0
    for _ in range(TRIES):
        most = max(most, _busy_cores(allowed))
        if most > allowed - SLACK:
            break
    return max(1, min(allowed, int(most + SLACK)))


def _busy_cores(threads: int) -> float:
    """CPU seconds per second of this process while as many threads hash, which holds no lock of the interpreter."""
    block, start = bytes(1 << 20), threading.Barrier(threads + 1)

    def hash_until_the_end(_: int) -> None:
        start.wait()
        until = time.perf_counter() + MEASURED
        while time.perf_counter() < until:
            hashlib.sha256(block)

    with ThreadPoolExecutor(threads) as pool:
        done = pool.map(hash_until_the_end, range(threads))
        start.wait()
        began, used = time.perf_counter(), time.process_time()
        list(done)
        return (time.process_time() - used) / (time.perf_counter() - began)
