"""Timing of contenders that take turns, so that other load on the machine affects all alike."""

from __future__ import annotations

import gc
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from lightning_bln.kernels import available

Job = Callable[[], object]


def wall_clock(job: Job) -> float:
    """Milliseconds that one call takes."""
    start = time.perf_counter()
    job()
    return (time.perf_counter() - start) * 1e3


def processor_time(job: Job) -> float:
    """Milliseconds of processor time that one call takes, summed over threads."""
    start = time.process_time()
    job()
    return (time.process_time() - start) * 1e3


def cuda_events(job: Job) -> float:
    """Milliseconds that one call takes on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    job()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def medians(
    jobs: dict[str, Job],
    rounds: int,
    slow: float = 100.0,
    clock: Callable[[Job], float] = wall_clock,
    *,
    settles: bool = False,
) -> dict[str, float]:
    """Median milliseconds of each job; those slower than ``slow`` run in a quarter of the rounds.

    Where it ``settles``, a job runs once more before each turn, and not in the memory that another one has left.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    first = {}
    for name, job in jobs.items():
        job()
        first[name] = clock(job)
    for i in range(rounds):
        for name, job in jobs.items():
            if first[name] < slow or i % 4 == 0:
                if settles:
                    job()
                times[name].append(clock(job))
    return {name: statistics.median(found) for name, found in times.items()}


def ratios(
    jobs: dict[str, Job], rounds: int, clock: Callable[[Job], float] = wall_clock, least: float = 2.0
) -> tuple[float, dict[str, float]]:
    """Microseconds of one call of the first job, and each job's time relative to it: medians over rounds.

    In a round all jobs run one after the other, each round from the next one on, and each ratio is of times of one
    round. A job is called once untimed, and then so often that the first one takes ``least`` milliseconds.
    """
    base, *_ = names = list(jobs)
    for job in jobs.values():
        job()
    calls = max(1, round(least / max(min(clock(jobs[base]) for _ in range(5)), 1e-3)))
    times: list[dict[str, float]] = []
    for i in range(rounds):
        found = {}
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            job = jobs[name]
            job()
            found[name] = clock(lambda job=job: [job() for _ in range(calls)]) / calls  # type: ignore[misc]
        times.append(found)
    took = 1e3 * statistics.median(one[base] for one in times)
    return took, {name: statistics.median(one[name] / one[base] for one in times) for name in names}


def peaks(jobs: dict[str, Job]) -> dict[str, float]:
    """Peak megabytes of one call of each job above those in use before it (Linux)."""
    found = {}
    for name, job in jobs.items():
        job()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        job()
        found[name] = (status("VmHWM") - before) / 1024
    return found


def allocated(job: Job) -> float:
    """Peak megabytes that torch allocates for one call, of what is in use at once."""
    job()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    events = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    changes = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return max(itertools.accumulate(changes, initial=0)) / 2**20


def status(name: str) -> int:
    """A value of /proc/self/status in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean, which treats a ratio and its inverse alike."""
    return statistics.geometric_mean(values)


def machine() -> str:
    """Description of the machine, for the results."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    parts = [
        fields.get("model name", platform.processor()),
        f"family {fields.get('cpu family')} model {fields.get('model')}",
        f"{os.cpu_count()} cores",
        f"{torch.get_num_threads()} threads",
        f"torch {torch.__version__}",
        f"kernels {available()['cpu']}",
        f"load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else "",
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return "; ".join(part for part in parts if part)
