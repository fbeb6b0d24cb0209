"""Several processes that work on one translation (`accelerate launch`, `torchrun`), on accelerate's `PartialState`.

In one process, and before `init`, everything here does nothing. In several each function but `rank`, `world_size`,
`is_main_process`, `split` and `batch_per_process` must be called by all of them, in the same order.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object


T = TypeVar("T")
# By what `accelerate launch` asks accelerate, transformers and Trainer to spread models, which is done here
# (shards.py).
LAUNCHER_SETTINGS = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
# While one process reads or solves the others wait; one that dies is noticed by the launcher, not by a timeout.
TIMEOUT = timedelta(days=1)


def init(device: str | torch.device | None = None) -> torch.device:
    """Join the other processes, if a launcher started several, and return the device to work on.

    Args:
        device: What the user asked for. With several processes only its type counts: each has an accelerator of its
            own.

    Raises:
        ValueError: If there is no such device, one accelerator is asked for by its number, which all processes would
            share, or accelerate has begun with DeepSpeed before.
    """
    wanted = resolve_device(device)
    if launched_processes() == 1:
        return wanted
    with hide_launcher_settings():
        state = PartialState(cpu=wanted.type == "cpu", timeout=TIMEOUT)
    if state.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "accelerate has begun with DeepSpeed, whose engine would wrap the target: call peft_cast before you make "
            "an `Accelerator` or a `PartialState`."
        )
    own = state.device
    if own.type == "cpu":
        return torch.device("cpu")
    if device is not None and wanted.index is not None and wanted != own:
        raise ValueError(
            f"`device` is '{wanted}', which all {launched_processes()} processes would share: leave it out, and each "
            "has its own."
        )
    return own


@contextmanager
def hide_launcher_settings() -> Iterator[None]:
    """Within the context no other library knows that FSDP or DeepSpeed was asked for in the launcher's
    configuration.
    """
    before = {name: os.environ.pop(name) for name in LAUNCHER_SETTINGS.values() if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def launched_processes() -> int:
    """How many processes a launcher started, whether or not they have joined yet."""
    known = dist.is_available() and "LOCAL_RANK" in os.environ
    return int(os.environ.get("WORLD_SIZE", 1)) if known else 1


def default_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def resolve_device(device: str | torch.device | None, name: str = "device") -> torch.device:
    """The device asked for, the default one if none is.

    Args:
        device: What the user asked for.
        name (`str`): Of the argument, for the message.

    Raises:
        ValueError: If there is no such device here.
    """
    if device is None:
        return default_device()
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`{name}` must be 'cpu', 'cuda' or another device of PyTorch, got {device!r}.") from error
    if wanted.type == "cpu":
        return wanted
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if here is None or wanted.type != here.type or (wanted.index or 0) >= torch.accelerator.device_count():
        count = f"{torch.accelerator.device_count()} of type '{here.type}'" if here else "no accelerator"
        raise ValueError(f"`{name}` is '{device}', but PyTorch finds {count} here: pass another, or leave it out.")
    return wanted


def resolve_source_device(asked: str | torch.device | None, device: torch.device) -> torch.device:
    """Where the source model works: on `device`, unless another is asked for.

    Raises:
        ValueError: If there is no such device here, or there are several processes, each of which has one device of
            its own.
    """
    if asked is None:
        return device
    if launched_processes() > 1:
        raise ValueError(
            "`source_device` is for one process; each of several has one device of its own: leave it out."
        )
    return resolve_device(asked, "source_device")


def training_device(device: str | torch.device | None) -> torch.device:
    """`resolve_device` for what `transformers.Trainer` trains on.

    Raises:
        ValueError: Also if it is another accelerator than the first, which is the only one that Trainer takes in one
            process.
    """
    wanted = resolve_device(device)
    if wanted.index and launched_processes() == 1:
        raise ValueError(
            f"`device` is '{device}', but Trainer works on the first device that it sees: let it see that one alone, "
            f"with CUDA_VISIBLE_DEVICES or its like in the environment, and pass '{wanted.type}'."
        )
    return wanted


def world_size() -> int:
    """How many processes there are."""
    return PartialState().num_processes if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    if dist.is_available() and dist.is_initialized():
        return PartialState().process_index
    return int(os.environ.get("RANK", 0)) if launched_processes() > 1 else 0


def is_main_process() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def on_main_process(make: Callable[[], T]) -> T:
    """What `make` gives in the main process, in all of them; an error of it is raised in all of them."""
    if world_size() == 1:
        return make()
    made: list[Any] = [None, None]
    if is_main_process():
        try:
            made[0] = make()
        except Exception as error:
            broadcast_object_list([None, _sendable(error)])
            raise
    value, failed = broadcast_object_list(made)
    if failed is not None:
        raise failed
    return value


def _sendable(error: Exception) -> Exception:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # it holds what cannot be sent
        return RuntimeError(str(error))


def on_every_process(act: Callable[[], None]) -> None:
    """Act in every process; an error in one of them is raised in all."""
    error: Exception | None = None
    try:
        act()
    except Exception as raised:
        error = raised
    errors = gather([error and f"{error} (process {rank()})"])
    if error is not None:
        raise error
    for message in filter(None, errors):
        raise OSError(message)


def broadcast(value: T) -> T:
    """The main process's value, where all have one that may differ in the last digits."""
    return on_main_process(lambda: value)


def gather(values: list[T]) -> list[T]:
    """The lists of all processes, one after another."""
    return gather_object(values) if world_size() > 1 else values


def split(items: Sequence[T], of: int | None = None) -> Sequence[T]:
    """This process's part of some items, or that of another: the first has the first ones. It may be empty."""
    size = -(-len(items) // world_size())
    first = size * (rank() if of is None else of)
    return items[first : first + size]


def all_reduce_sum(*tensors: torch.Tensor) -> None:
    """Replace tensors by their sums over all processes."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def sum_numbers(*numbers: float) -> list[float]:
    """The sums of some numbers over all processes, NaN where one is."""
    if world_size() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=PartialState().device)
    all_reduce_sum(sums)
    return sums.tolist()


def all_reduce_min(number: int) -> int:
    """The smallest of the processes' numbers."""
    return min(gather([number]))


def any_process(condition: bool) -> bool:
    """Whether it holds in any process."""
    return sum_numbers(float(condition))[0] > 0


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Within the context one process after another works, e.g. where the memory of a machine does not suffice for all
    at once.
    """
    for turn in range(world_size()):
        if turn == rank():
            yield
        if world_size() > 1:
            PartialState().wait_for_everyone()


def batch_per_process(batch_size: int) -> int:
    """Texts that each process takes of a batch.

    Raises:
        ValueError: If they do not come out even.
    """
    if batch_size % world_size():
        raise ValueError(
            f"`batch_size` is {batch_size}, the texts of all {world_size()} processes together, and must be a "
            "multiple of their number."
        )
    return batch_size // world_size()
