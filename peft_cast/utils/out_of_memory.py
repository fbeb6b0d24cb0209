"""Where memory runs out, smaller batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from . import distributed


T = TypeVar("T")


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error is that of a full memory: of an accelerator, of torch's CPU allocator, or Python's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and (should_reduce_batch_size(error) or "out of memory" in str(error))


def within_memory(attempt: Callable[[int], T], size: int) -> T:
    """`attempt(size)`, and again with the next smaller divisor of `size` as often as memory runs out.

    Several processes do not try again: those that had enough memory wait for the others in the middle of a batch. The
    error ends the one, and with it the launcher ends all.

    accelerate's `find_executable_batch_size` takes 0.9 of the size each time, which leaves no whole number of batches.

    Args:
        attempt: Works on so many texts at a time.
        size (`int`): How many.

    Raises:
        torch.OutOfMemoryError: If memory does not suffice for one text at a time, or at all with several processes.
    """
    while True:
        try:
            return attempt(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if distributed.world_size() > 1:
                raise torch.OutOfMemoryError(
                    f"Memory ran out in process {distributed.rank()} with {-(-size // distributed.world_size())} "
                    "texts at a time: begin anew with a smaller `batch_size`, and `gradient_accumulation_steps` in "
                    f"`training_args` for as many texts per step. ({error})"
                ) from error
            if size == 1:
                raise torch.OutOfMemoryError(
                    "Memory does not suffice for one text at a time: lower `max_length`, or load the models in "
                    f"bfloat16. ({error})"
                ) from error
        smaller = max(divisor for divisor in range(1, size) if size % divisor == 0)
        warnings.warn(f"Memory ran out with {size} texts at a time: going on with {smaller}.")
        clear_device_cache(garbage_collection=True)  # out here, where the error holds no tensors any more
        size = smaller
