"""What the cost of a translation depends on of a device, and that of some by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


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
