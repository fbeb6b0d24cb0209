"""What a name of a model, adapter or bridge stands for: a folder here, a repository on the hub, a subfolder in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, list_repo_files
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch.nn import Module

from ..tuner.checks import read_json


_LONGEST = 255  # letters of a part of a path
_AT_REVISION = re.compile(r"([\w-][\w.-]*/[\w.-]+(?:/[\w./-]+)?)@([\w./-]+)")  # as other tools write it
# What follows the Hub's host in an address, or any other address.
_ADDRESS = re.compile(
    r"(?:https?://)?(?:[^/@]*@)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^?#]*[^?#/])/?(?:[?#].*)?|\w+://.*"
)


def find_file(adapter: str | Path, name: str, revision: str | None = None) -> Path:
    """A file of an adapter in a folder or on the hub, `user/repo` or `user/repo/subfolder`.

    Raises:
        EntryNotFoundError: If the adapter has no such file.
        OSError, ValueError: If the adapter cannot be reached.
    """
    if Path(adapter).is_dir():
        file = Path(adapter) / name
        if not file.is_file():
            raise EntryNotFoundError(str(file))
        return file
    repo_id, subfolder = hub_parts(adapter)
    return Path(hf_hub_download(repo_id, name, subfolder=subfolder, revision=revision))


def holds_file(name: str | Path, file: str, revision: str | None = None) -> bool:
    """Whether a folder or repository has a file; not if it is out of reach."""
    try:
        find_file(name, file, revision)
    except (EntryNotFoundError, OSError, ValueError):
        return False
    return True


def is_out_of_reach(error: BaseException) -> bool:
    """Whether an error came of a hub without a connection."""
    return isinstance(error, LocalEntryNotFoundError) or (
        error.__cause__ is not None and is_out_of_reach(error.__cause__)
    )


def why_not_on_hub(error: BaseException, name: str | Path, revision: str | None, config: str) -> str | None:
    """Why what has this name, a folder with the file `config`, could not be read on the hub, in a sentence that ends
    with the remedy; `None` if the error, or what led to it, is none of the hub's.
    """
    repo_id, subfolder = hub_parts(name)
    if isinstance(error, RevisionNotFoundError):
        return f"on the Hub '{repo_id}' has no revision '{revision}': correct it."
    if isinstance(error, GatedRepoError):
        return (
            f"on the Hub '{repo_id}' is for those who asked for it: ask on its page, and log in with `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no such folder here, and the Hub has no repository '{repo_id}', or a private one: correct the "
            "name, or log in with `hf auth login`."
        )
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        return "the Hub does not know your token: log in with `hf auth login`."
    if isinstance(error, LocalEntryNotFoundError):
        where = f" in the subfolder '{subfolder}' of the repository '{repo_id}'" if subfolder else ""
        why = "check your connection"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set, and it was not fetched before, so unset that"
        return (
            f"there is no such folder here, and on the Hub{where} it could not be reached: {why}, or pass a folder "
            f"with {config}."
        )
    if error.__cause__ is not None:
        return why_not_on_hub(error.__cause__, name, revision, config)
    return None


def hub_parts(name: str | Path) -> tuple[str, str | None]:
    """The repository and the subfolder in it that a name on the hub stands for."""
    parts = str(name).strip("/").split("/")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def hub_revision(name: Any, revision: str | None) -> str | None:
    """A revision that was noted beside a name; `None` for a folder here, which has none."""
    return None if isinstance(name, (str, Path)) and Path(name).is_dir() else revision


def adapter_folder(adapter: str | Path, revision: str | None = None) -> Path:
    """The folder here that holds an adapter's configuration and weights, which are fetched from the hub if they are
    there.
    """
    find_file(adapter, CONFIG_NAME, revision)
    return find_file(adapter, SAFETENSORS_WEIGHTS_NAME, revision).parent


def files_of(adapter: str | Path, revision: str | None = None) -> list[str]:
    """Names of the files in an adapter's folder and one level below, or in a repository; none if out of reach."""
    if (folder := Path(adapter)).is_dir():
        return sorted(file.relative_to(folder).as_posix() for level in ("*", "*/*") for file in folder.glob(level))
    repository, inner = hub_parts(adapter)
    start = f"{inner}/" if inner else ""
    with suppress(Exception):  # whatever the hub says: what is wanted is said without the list
        names = list_repo_files(repository, revision=revision)
        return sorted(name.removeprefix(start) for name in names if name.startswith(start))
    return []


def _is_hub_id(name: str) -> bool:
    repo_id, subfolder = hub_parts(name)
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return False
    return not {"", ".", ".."} & set((subfolder or "as it is").split("/"))


def looks_like_path(name: Any) -> bool:
    """Whether a name can be no hub id (`name`, `user/name`, or with a subfolder)."""
    if "://" in str(name):
        return False
    return isinstance(name, Path) or str(name).startswith((".", "/", "~")) or "\\" in str(name)


def no_file_is_called(name: str | os.PathLike) -> bool:
    """Whether a name is none that a file system takes: one with a zero byte, or too long."""
    text = os.fspath(name)
    return "\0" in text or max(map(len, text.split("/"))) > _LONGEST


def why_no_name(name: str | Path) -> str | None:
    """What is wrong with what is neither a folder nor a hub id: web addresses, folders that are not there, and files
    of llama.cpp.
    """
    text, folder = str(name), Path(str(name))
    if no_file_is_called(text):
        return f"{text[:60]!r}… is no name of a folder or a hub id"
    if text.endswith(".gguf") or (not list(folder.glob("*.json")) and list(folder.glob("*.gguf"))):
        return f"'{text}' is in llama.cpp's format GGUF, made from what is wanted here"
    if folder.exists():
        return None
    if (found := _AT_REVISION.fullmatch(text)) is not None:
        return f"'{text}' is no hub id, that is '{found[1]}', its revision '{found[2]}'"
    if (found := _ADDRESS.fullmatch(text)) is None:
        if looks_like_path(name):
            return f"there is no folder '{name}'"
        return f"there is no folder '{name}', and no hub id is written so" if text and not _is_hub_id(text) else None
    parts = (found[1] or "").split("/")
    if len(parts) < 2 or parts[0] in ("datasets", "spaces"):
        return f"'{text}' is an address of something else than a model or adapter on the Hub"
    hub_id, revision = parts[:2], "main"
    if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve"):  # a folder's page, or a file's
        hub_id, revision = hub_id + (parts[4:] if parts[2] == "tree" else parts[4:-1]), parts[3]
    also = f", its revision '{revision}'" if revision != "main" else ""
    return f"'{text}' is a web address, its hub id is '{'/'.join(hub_id)}'{also}"


def why_no_model(model: Any) -> str | None:
    """What is wrong with what was passed as a model, if that can be seen in the folder; `None` if not."""
    folder = Path(str(model))
    if (why := why_no_name(model)) is not None:
        return why
    if folder.is_dir() and not (folder / "config.json").is_file():
        kind = "an adapter, not a model" if (folder / CONFIG_NAME).is_file() else "no model: it has no config.json"
        return f"'{folder}' holds {kind}"
    if not folder.exists() and hub_parts(str(model))[1]:
        return f"there is no folder '{model}', and in subfolders of a repository on the Hub only adapters are read"
    return f"'{folder}' is a file" if folder.is_file() else None


def differ(one: str | Path | None, other: str | Path | None) -> bool:
    """Whether two names seem to be those of different models: hub ids, or folders that are here, whose last parts
    differ, and those of the names that the folders' configurations keep.

    Equal last parts may be copies of one model, and what is in a folder that is gone, nobody knows.
    """
    if not one or not other or any(looks_like_path(name) and not Path(name).exists() for name in (one, other)):
        return False
    return not _called(one) & _called(other)


def _called(name: str | Path) -> set[str]:
    """The last parts of a model's names: its own, and the one that transformers 4 kept in a copy's configuration."""
    if not Path(name).is_dir():
        return {_last_part(name)}
    kept = None
    with suppress(OSError, ValueError):
        kept = read_json(Path(name) / "config.json").get("_name_or_path")
    own = {_last_part(path) for path in (Path(name).absolute(), Path(name).resolve())}
    return own | {_last_part(kept)} if isinstance(kept, str) and Path(kept).name else own


def _last_part(name: str | Path) -> str:
    parts = Path(name).parts
    cached = [part for part in parts if part.startswith("models--")]  # a snapshot's folder is called by its commit
    return (cached[-1].rpartition("--")[2] if cached else parts[-1]).casefold()


def why_no_folder(name: Any, config: str, revision: str | None = None) -> str | None:
    """What is wrong with what was passed as a hub id or a folder that has a certain file, if that can be seen, or with
    the revision beside it.
    """
    remedy = f"pass a hub id or a folder with {config}"
    if not isinstance(name, (str, Path)):
        if isinstance(getattr(name, "_orig_mod", name), PeftModel):  # as torch.compile wraps it
            return "a PeftModel in memory has no files: save it, with `save_pretrained(folder)`, and pass the folder"
        kind = type(name).__name__
        if config == CONFIG_NAME and isinstance(name, Iterable) and not isinstance(name, Module):
            several = "pass one at a time, and to `translate` several as a list, with names as `adapter_name=[...]`"
            return f"an object of type {kind} is no name of one: {several}"
        return f"an object of type {kind} is no name of one: {remedy}"
    if not str(name).strip():
        return f"its name is empty: {remedy}"
    if (why := why_no_name(name)) is not None:
        return f"{why}: {remedy}"
    folder = Path(name)
    if revision is not None and folder.is_dir():
        return f"'{folder}' is a folder, and revisions ('{revision}') are for hub ids: leave it out, or pass a hub id"
    return f"'{folder}' is a file: pass the folder that it is in" if folder.is_file() else None
