"""Files and folders that appear complete or not at all, whatever stops the writing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .names import no_file_is_called
from .secrets import without_secrets


METRICS_NAME = "cast_metrics.json"  # beside an adapter that is a result of this package
PARTIAL = ".partial-"  # what is being written, or was when a run was killed
# What the system says of places where nothing can be made, which it says of other files than those that are meant.
_WHY = {errno.ENOENT: "no folder can be made there", errno.EEXIST: "it is a file", errno.ENOTDIR: "it is below a file"}


def as_path(value: Any) -> Any:
    """A path of any library as a `Path`, also in a list, and a name that begins with `~` as what it stands for, if
    that is there; all else as it is.
    """
    if isinstance(value, (list, tuple)):
        return [as_path(one) for one in value]
    path = Path(value) if isinstance(value, os.PathLike) else value
    if isinstance(path, (str, Path)) and str(path).startswith("~") and os.path.exists(own := os.path.expanduser(path)):
        return type(path)(own)
    return path


def as_place(value: str | Path, argument: str = "folder") -> Path:
    """Where something is to be written, with `~` as the user's own folder.

    Args:
        value: A file or folder.
        argument (`str`): As what it is passed, for messages.

    Raises:
        ValueError: If it is no path, no name of one, or empty, which would be the current folder.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"`{argument}` must be the name of a file or folder, got {type(value).__name__}.")
    if not os.fspath(value):
        raise ValueError(f"`{argument}` is empty: pass where to write.")
    if no_file_is_called(value):
        raise ValueError(f"`{argument}`, {os.fspath(value)[:60]!r}…, is no name that a file can have: pass another.")
    return Path(os.path.expanduser(value))


@contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """Within the context write to the path that is given; at the end it takes the place of `file`.

    Raises:
        OSError: If it cannot be written; what stood there before is intact.
    """
    file = as_place(file, "file")
    partial = file.with_name(f"{PARTIAL}{os.getpid()}-{file.name}")
    with _writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def complete_folder(folder: str | Path, key: str = "adapter_config.json") -> Iterator[Path]:
    """Within the context write to the folder that is given; at the end its files move into `folder`.

    Files called `key`, without which nothing loads the folder, come last, and old ones that differ go first: a new
    adapter is never read with the configuration of another.

    Raises:
        OSError: If something cannot be written; what stood in `folder` before is intact.
    """
    folder = as_place(folder)
    with _writing(folder):
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
        try:
            yield partial
            moves = {file: folder / file.relative_to(partial) for file in partial.rglob("*") if file.is_file()}
            for file, place in moves.items():
                if file.name == key and place.exists() and place.read_bytes() != file.read_bytes():
                    place.unlink()
            for file, place in sorted(moves.items(), key=lambda move: move[0].name == key):
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # not empty: all went well
                    folder.rmdir()


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Within the context what keeps something from being written is told in a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        root = _root(error)
        if isinstance(root, SafetensorError) or getattr(root, "errno", None) is not None:
            raise OSError(unwritten(place, error)) from error
        raise  # not the system's: in words already


def _root(error: BaseException) -> BaseException:
    """What the system, or safetensors, said, of which an error tells in words."""
    while isinstance(error, OSError) and error.errno is None and error.__cause__ is not None:
        error = error.__cause__
    return error


def why_unwritten(error: BaseException) -> str:
    """Why something could not be written, in a few words, without the system's numbers."""
    root = _root(error)
    if words := _WHY.get(getattr(root, "errno", None) or 0):
        return words
    return getattr(root, "strerror", None) or str(root)


def unwritten(place: str | Path, error: BaseException) -> str:
    """That a file or folder could not be written, and what to do, in a sentence."""
    why = why_unwritten(error)
    room = "make room there, or " if re.search("no space|quota", why, re.IGNORECASE) else ""
    return f"'{without_secrets(place)}' cannot be written ({why}): {room}write to another folder."


def check_writable(folder: str | Path) -> None:
    """Refuse, before the work, a folder in which nothing can be written, whether it is there or has to be made.

    Raises:
        OSError: Saying why.
    """
    folder = as_place(folder)
    new = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:  # asking for rights says less: the administrator has them all, and below /proc there is no folder to be made
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(unwritten(folder, error)) from None
    finally:
        for place in new:
            with suppress(OSError):
                place.rmdir()


def check_output(file: str | Path, argument: str) -> None:
    """Refuse, before the work, a file that cannot be written.

    Raises:
        ValueError: If it is no name of a file, is empty, or a folder.
        OSError: If nothing can be written where it is.
    """
    file = as_place(file, argument)
    if file.is_dir():
        raise ValueError(f"`{argument}`, '{file}', is a folder: pass the name of a file in it.")
    check_writable(file.parent)


def check_place(folder: str | Path, *inputs: Any, kind: str | None = "CAST") -> Path:
    """Refuse to write a result where something else is kept.

    Args:
        folder: Where an adapter shall be written.
        inputs: What it is made from: names, or objects, which are in nobody's way.
        kind (`str`): PEFT's type of the adapter that is written, "MLX" for one of mlx-lm; one of the same type may be
            replaced. `None` for a bridge.

    Returns:
        `Path`: The folder, see `as_place`.

    Raises:
        ValueError: If the folder is empty text, one of the inputs, holds a model, an adapter of another type or a LoRA
            that training made, or is a file.
        OSError: If it cannot be written.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"What is made must be written to a folder, got {type(folder).__name__}.")
    folder = as_place(folder)
    if any(
        isinstance(name, (str, Path)) and Path(name).exists() and folder.resolve() == Path(name).resolve()
        for name in map(as_path, inputs)
    ):
        raise ValueError(f"'{folder}' would be overwritten while it is read: write to another folder.")
    if folder.is_file():
        raise ValueError(f"'{folder}' is a file: write to a folder.")
    check_writable(folder)
    config = read_json_if_there(folder / "adapter_config.json")
    mlx = {"peft_type": "MLX"} if isinstance(config, dict) and "fine_tune_type" in config else {}
    there = {**mlx, **config}.get("peft_type") if isinstance(config, dict) else None
    if there not in (None, kind):
        raise ValueError(
            f"'{folder}' holds an adapter of type {there}, which would be overwritten: write to another folder."
        )
    if there == "LORA" and not (folder / METRICS_NAME).exists():  # training made it, and nothing makes it again
        raise ValueError(
            f"'{folder}' holds a LoRA that is no result of peft-cast, which would be overwritten: write to another "
            "folder."
        )
    others = {"config.json": "a model"} | ({} if kind is None else {"bridge_config.json": "a bridge"})
    for name, what in others.items():
        if (folder / name).exists():
            raise ValueError(f"'{folder}' holds {what}: write to another folder.")
    return folder


def write_tensors(tensors: Mapping[str, torch.Tensor], file: str | Path, **metadata: str) -> None:
    """Write a safetensors file. It appears complete or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    with replacing(file) as partial:
        save_file(dict(tensors), partial, metadata=metadata or None)


def change_dtype(file: str | Path, dtype: torch.dtype) -> None:
    """Write a safetensors file again with its floating-point tensors in another precision.

    Where they are in it already, nothing is done. A warning says if a number is out of its range: the file is left as
    it is.
    """
    with safe_open(file, framework="pt") as saved:
        metadata = saved.metadata() or {}
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}
    others = {name: t.to(dtype) for name, t in tensors.items() if t.is_floating_point() and t.dtype != dtype}
    wide = next((name for name, t in others.items() if t.isinf().any() and not tensors[name].isinf().any()), None)
    if wide is not None:
        warnings.warn(f"'{wide}' has numbers beyond the range of {dtype}: the file is saved in {tensors[wide].dtype}.")
    elif others:
        write_tensors({**tensors, **others}, file, **metadata)


def write_json(value: Any, file: str | Path, indent: int | None = 1) -> None:
    """Write a JSON file, likewise; access tokens in it are left out, see `without_secrets`."""
    with replacing(file) as partial:
        partial.write_text(without_secrets(json.dumps(value, indent=indent)) + "\n", encoding="utf-8")


def read_json_if_there(file: Path) -> Any:
    """What the file holds, `None` if it is not there or broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Within the context something is written that a run can do without: an OSError becomes a warning."""
    try:
        yield
    except OSError as error:
        why = why_unwritten(error)
        warnings.warn(f"{what} could not be kept ({why}): the run goes on, and a resumed one makes it anew.")


def remove_partial(folder: Path) -> None:
    """Remove what killed runs left half-written in a folder and its subfolders."""
    for left in list(folder.rglob(f"{PARTIAL}*")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
