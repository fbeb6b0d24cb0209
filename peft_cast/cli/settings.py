"""From files and words on the command line to the arguments of the package's functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import peft_cast

from .. import utils
from ..options import GROUPS, names_taken
from ..utils.fields import unknown


if TYPE_CHECKING:
    import torch


TASKS = {
    "likelihood": "AnswerLikelihood",
    "classification": "Classification",
    "generation": "Generation",
    "harness": "HarnessTask",
}


def read_config(path: Path | None) -> dict[str, Any]:
    """The arguments in a YAML or JSON file (JSON is YAML); none if there is no file.

    Raises:
        ValueError: If it cannot be read, or is no mapping.
    """
    if path is None:
        return {}
    text = _read(path, "config file")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"The config file '{path}' could not be read: {_where(error)}.") from error
    if config is None:
        raise ValueError(f"The config file '{path}' is empty: write `name: value` lines, or leave it out.")
    if not isinstance(config, dict):
        raise ValueError(f"The config file '{path}' must hold `name: value` lines, it holds {type(config).__name__}.")
    return {str(name).replace("-", "_"): value for name, value in config.items()}


def _where(error: yaml.YAMLError) -> str:
    """Where a text is neither YAML nor JSON, and why."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "it cannot be taken apart"
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"it is neither YAML nor JSON ({place}{problem})"


def read_settings(words: Iterable[str] | None) -> dict[str, Any]:
    """`["gamma=0.5", "depth_map=similarity"]` as a dictionary; values are YAML.

    Raises:
        ValueError: If a word is no `name=value`.
    """
    settings = {}
    for word in words or ():
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ValueError(f"`--set` takes name=value, got '{word}'.")
        try:
            settings[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"The value of `--set {word}` could not be read: {_where(error)}.") from error
    return settings


def arguments_for(function: Callable, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments from several places, later ones first; `None` counts as not given.

    Args:
        function: What they are for.
        layers: Dictionaries; text and dtype are made into what the function takes.

    Raises:
        ValueError: If the function has no such argument.
    """
    own = inspect.signature(function).parameters.values()
    known = {p.name for p in own if p.kind is p.KEYWORD_ONLY and p.name not in GROUPS} | set(names_taken(function))
    given = {name: value for layer in layers for name, value in layer.items() if value is not None}
    if odd := sorted(set(given) - set(known)):
        raise ValueError(f"`{function.__name__}` has no argument '{odd[0]}': {unknown(odd[0], sorted(known))}")
    for name in ("text", "fit_text", "drift_text"):
        if name in given:
            given[name] = text_of(given[name])
    for name in ("dtype", "save_dtype"):
        if isinstance(given.get(name), str):
            given[name] = dtype_of(given[name], name)
    if isinstance(given.get("depth_map"), dict):
        try:
            given["depth_map"] = {int(source): int(target) for source, target in given["depth_map"].items()}
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`depth_map` maps layer numbers to layer numbers, got {given['depth_map']!r}."
            ) from error
    return given


def dtype_of(name: str, argument: str = "dtype") -> torch.dtype:
    import torch

    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`{argument}` must be float32, bfloat16 or float16, got '{name}'.")
    return dtype


def text_of(value: Any) -> Any:
    """A text as the command line and config files write it.

    Args:
        value: `"c4"`; a hub dataset id or file; `"self"` for text that the models write, `"survey"` for a `Survey`; a
            mapping with the arguments of `SelfWritten` under `self`, of `Survey` under `survey` or of `Corpus` under
            `corpus`; or a list of mappings with `text` and `weight`. `prompts` may be a file, see `read_prompts`.

    Raises:
        ValueError: For anything else.
    """
    from ..text import C4, Corpus, Mixture, SelfWritten, Survey

    if isinstance(value, str):
        return {"self": SelfWritten(), "survey": Survey(), "c4": C4, "C4": C4}.get(value, value)
    if isinstance(value, list) and value and all(isinstance(part, dict) and "text" in part for part in value):
        return Mixture(*((text_of(part["text"]), part.get("weight", 1)) for part in value))
    if isinstance(value, dict) and set(value) in ({"self"}, {"survey"}):
        ((kind, given),) = value.items()
        options = dict(given or {})
        if isinstance(options.get("prompts"), str):
            options["prompts"] = read_prompts(Path(options["prompts"]))
        if "corpus" in options:
            options["corpus"] = text_of(options["corpus"])
        return _made(Survey if kind == "survey" else SelfWritten, options, kind)
    if isinstance(value, dict) and set(value) == {"corpus"}:
        return _made(Corpus, value["corpus"], "corpus")
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return value
    raise ValueError(
        "A text is a file, a hub dataset id, 'c4', 'self', 'survey', {self: {prompts: ...}}, {corpus: {source: ...}}, "
        f"a list of strings, or a list of {{text: ..., weight: ...}}, got {value!r}."
    )


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt per line, `\\n` for a line break within it.

    Raises:
        ValueError: If the file cannot be read or is empty.
    """
    lines = _read(path, "prompts").splitlines()
    prompts = tuple(line.replace("\\n", "\n") for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"The file '{path}' holds no prompt: write one per line.")
    return prompts


def _read(path: Path, what: str) -> str:
    """
    Raises:
        ValueError: If there is no such text file; in words of ours, Python's have numbers in brackets.
    """
    try:
        return utils.as_path(path).read_text(encoding="utf-8-sig")  # as some editors save UTF-8
    except FileNotFoundError:
        why = "there is no such file"
    except IsADirectoryError:
        why = "it is a folder, pass a file"
    except UnicodeDecodeError:
        why = "save it as UTF-8"
    except OSError as error:
        why = str(error.strerror)
    raise ValueError(f"The {what} '{path}' could not be read: {why}.")


def tasks_of(value: Any) -> list:
    """Tasks from a config file: a list of mappings, each with a `type` (see `TASKS`) and the arguments of that
    class.
    """
    if not isinstance(value, list) or not all(isinstance(task, dict) for task in value):
        raise ValueError(f"`tasks` must be a list of mappings with a `type`, one of {', '.join(TASKS)}.")
    tasks = []
    for task in value:
        options = dict(task)
        kind = options.pop("type", None)
        if not isinstance(kind, str) or kind not in TASKS:
            raise ValueError(f"A task's `type` must be one of {', '.join(TASKS)}, got {kind!r}.")
        if isinstance(options.get("labels"), list):
            options["labels"] = tuple(options["labels"])
        tasks.append(_made(getattr(peft_cast, TASKS[kind]), options, kind))
    return tasks


def _made(kind: type, options: Any, name: str) -> Any:
    if not isinstance(options, dict):
        raise ValueError(f"`{name}` takes a mapping of its options, got {options!r}.")
    known = {field.name: field for field in fields(kind)}
    if odd := sorted(set(map(str, options)) - set(known)):
        raise ValueError(f"`{name}` has no option '{odd[0]}': {unknown(odd[0], list(known))}")
    needed = [key for key, field in known.items() if field.default is field.default_factory is MISSING]
    if lacking := [f"`{key}`" for key in needed if key not in options]:
        both = [", ".join(lacking[:-1]), lacking[-1]] if len(lacking) > 1 else lacking
        raise ValueError(f"`{name}` lacks {' and '.join(both)}: add {'them' if len(lacking) > 1 else 'it'}.")
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"`{name}` cannot be made of its options: {error}.") from error
