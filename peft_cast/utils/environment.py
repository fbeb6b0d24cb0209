"""The machine and versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


PACKAGES = ("peft-cast", "torch", "transformers", "peft", "accelerate", "datasets", "lm-eval")


def environment() -> dict[str, Any]:
    """JSON-ready: processor, cores, accelerator, Python and the versions of the packages that matter."""
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "bfloat16_on_cpu": torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _processor() -> str:
    """The model name where the system tells it (Linux), else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
