"""How fast and large this machine is, and a device that is named."""

from __future__ import annotations

import platform
import time

import psutil
import torch

from ..models import default_dtype
from ..tuner.checks import number_of
from .data_sheets import DEVICES, Device


# A pass reaches less than a large product: norms, attention and activations wait for memory (docs/planning.md).
REACHED_ON_CPU, REACHED_ON_GPU = 0.6, 0.5
# Measured (docs/lab-book.md, Memory). oneDNN keeps the code and buffers of its last thousand products of different
# shapes, which some thirty batches of different shapes have.
GROWTH_ON_CPU, KEPT_PRODUCTS_ON_CPU, SHAPES_KEPT = 400 * 2**20, 1100 * 2**20, 30


def this_machine() -> Device:
    """The device that `translate` would use here, its rates measured within about a second."""
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        memory = torch.cuda.mem_get_info()[1] if device.type == "cuda" else psutil.virtual_memory().total
        name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        runtime = 2**29
    else:
        device, memory = torch.device("cpu"), psutil.virtual_memory().total
        name, runtime = (
            f"{platform.machine()} CPU, {number_of(torch.get_num_threads(), 'thread')}",
            psutil.Process().memory_info().rss,
        )
    on_cpu = device.type == "cpu"
    reached = REACHED_ON_CPU if on_cpu else REACHED_ON_GPU
    half, single = (reached * matmul_rate(device, dtype) for dtype in (default_dtype(device), torch.float32))
    return Device(
        name, half, single, memory, runtime, growth=on_cpu * GROWTH_ON_CPU, kept_products=on_cpu * KEPT_PRODUCTS_ON_CPU
    )


def device_of(device: str | Device | None) -> Device:
    """One of `DEVICES` by its name, a device as it is, and this machine for `None`.

    Raises:
        ValueError: If there is none of that name.
    """
    if device is None:
        return this_machine()
    if isinstance(device, str) and device not in DEVICES:
        raise ValueError(
            f"There is no device '{device}': choose from {', '.join(DEVICES)} (in Python a `Device` of your own)."
        )
    return DEVICES[device] if isinstance(device, str) else device


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product, the best of a few."""
    n = 1024 if device.type == "cpu" else 8192
    # Random, as the docs' figures: a GPU multiplies ones a tenth faster.
    draw = torch.Generator(device).manual_seed(0)
    a = torch.randn(n, n, dtype=dtype, device=device, generator=draw)
    return max(2 * n**3 / _seconds(lambda: a @ a, device) for _ in range(6))


def _seconds(work, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
