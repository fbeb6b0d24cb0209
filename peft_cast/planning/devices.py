"""How fast and large a device is."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass

import psutil
import torch

from ..models import default_dtype
from ..tuner.checks import number_of


@dataclass(frozen=True)
class Device:
    """A device as far as the cost of a translation depends on it.

    Args:
        name (`str`): What it is called.
        flops (`float`): Half-precision matrix multiplication, floating-point operations per second that passes of a
            language model reach.
        flops32 (`float`): Likewise in float32.
        memory (`int`): Bytes.
        runtime (`int`): Bytes taken before the first model is loaded: the process on a CPU, the context on a GPU.
        start (`float`): Seconds that a matrix product takes at least, however small: what Python needs to start it and
            the small operations around it.
        growth (`int`): Bytes by which the process grows once it works: modules that are imported late.
        kept_products (`int`): Bytes by which it grows further as batches come in ever new shapes.
    """

    name: str
    flops: float
    flops32: float
    memory: int
    runtime: int
    start: float = 1e-4
    growth: int = 0
    kept_products: int = 0


# A pass reaches less than a large product: norms, attention and activations wait for memory (docs/planning.md).
REACHED_ON_CPU, REACHED_ON_GPU = 0.6, 0.5
# Measured (docs/lab-book.md, Memory). oneDNN keeps the code and buffers of its last thousand products of different
# shapes, which some thirty batches of different shapes have.
GROWTH_ON_CPU, KEPT_PRODUCTS_ON_CPU, SHAPES_KEPT = 400 * 2**20, 1100 * 2**20, 30


def _accelerator(name: str, flops: float, flops32: float, gigabytes: int) -> Device:
    """By its data sheet; passes reach about 40% of the peak, and the context takes half a gigabyte."""
    return Device(name, 0.4 * flops, 0.4 * flops32, gigabytes * 2**30, 2**29)


# Peak rates by NVIDIA's data sheets (dense bfloat16; TF32 is off in PyTorch by default, so float32 is plain).
DEVICES = {
    device.name: device
    for device in (
        _accelerator("h200", 989e12, 67e12, 141),
        _accelerator("h100", 989e12, 67e12, 80),
        _accelerator("a100", 312e12, 19.5e12, 80),
        _accelerator("l40s", 362e12, 91.6e12, 48),
        _accelerator("rtx4090", 165e12, 82.6e12, 24),
    )
}


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
