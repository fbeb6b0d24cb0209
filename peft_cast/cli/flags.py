"""Flags that are read off the options: each everyday one gets a flag, with its own help."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..options import GROUPS, names_taken


# By the first word of an option's annotation, which is not evaluated: that would import PyTorch.
_KINDS = {"int": int, "float": float, "bool": bool}


def with_flags(function: str) -> Callable[[Callable], Callable]:
    """Give a command a flag for each everyday option of a function; those that are given reach it as `flags`.

    Args:
        function (`str`): Name of the function of the package that the command calls.
    """

    def decorate(command: Callable) -> Callable:
        names = [name for name, one in names_taken(function).items() if one.metadata["everyday"]]

        def run(**given: Any) -> Any:
            flags = {name: given.pop(name) for name in names}
            return command(**given, flags={name: value for name, value in flags.items() if value is not None})

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
        made = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(name))
            for name in names
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *made)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _flag(name: str) -> Any:
    group = next(kind for kind in GROUPS.values() if name in kind.__dataclass_fields__)
    field = group.__dataclass_fields__[name]
    kind = _KINDS.get(str(getattr(field.type, "__name__", field.type)).partition(" ")[0], str)
    sentence = field.metadata["help"].split(". ")[0].rstrip(".") + "."
    flag = typer.Option(help=sentence, rich_help_panel=group.__name__)
    return Annotated[kind | None, flag]  # type: ignore[operator]
