"""What each phase of a run costs: seconds and peak memory."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil
import torch


def give_back_memory() -> None:
    """Give what was freed back to the system: glibc keeps it otherwise, gigabytes after a closed form."""
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass
class Phases:
    """Costs of the phases so far.

    Args:
        costs (`dict[str, dict[str, float]]`): For each phase `seconds`, `peak_memory_mb` (resident memory of the
            process) and, with an accelerator, `peak_device_memory_mb`.
    """

    costs: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the enclosed phase; a phase in several pieces adds up."""
        process, done = psutil.Process(), threading.Event()
        peak = [process.memory_info().rss]

        def watch() -> None:
            while not done.wait(0.05):
                peak[0] = max(peak[0], process.memory_info().rss)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            give_back_memory()
            cost = {"seconds": round(time.perf_counter() - start, 2), "peak_memory_mb": round(peak[0] / 2**20, 1)}
            if torch.cuda.is_available():
                cost["peak_device_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
            for key, value in self.costs.get(name, {}).items():
                cost[key] = round(cost[key] + value, 2) if key == "seconds" else max(cost[key], value)
            self.costs[name] = cost
