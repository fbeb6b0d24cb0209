"""What a person sees: results on stdout, all else on stderr, and every end a sentence and an exit code."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, TextIO

import datasets
import torch
import transformers
from rich.console import Console
from typer.core import TyperGroup


_err = Console(stderr=True, soft_wrap=True, highlight=False)
_results: ContextVar[TextIO] = ContextVar("results")


class Commands(TyperGroup):
    """Commands whose results alone go to stdout, so that they can be piped; Trainer and others print there too."""

    def invoke(self, ctx: Any) -> Any:
        _results.set(sys.stdout)
        # Errors are met before click turns Ctrl-C into "Aborted!" and the rest into tracebacks.
        with redirect_stdout(sys.stderr), _ending_well():
            return super().invoke(ctx)


def say(text: str, heading: str = "") -> None:
    """Print to stderr, after a colored heading (rich's markup) if there is one; the text is printed as it is."""
    if heading:
        _err.print(heading, end="  ")
    _err.print(text, markup=False)


def print_result(account: dict[str, Any], text: str, as_json: bool, quiet: bool = False) -> None:
    """Print a result to stdout, as JSON or as text."""
    stdout = _results.get()
    if as_json:
        stdout.write(json.dumps(account, indent=1, default=str) + "\n")
    elif text and not quiet:
        stdout.write(text + "\n")


def hush(quiet: bool) -> None:
    """Without the bars of the libraries."""
    if quiet:
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()


@contextmanager
def _ending_well() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it says of a broken file, the error says too
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch|transformers|datasets")
            warnings.showwarning = _warn  # type: ignore[assignment]  # it is given more, and needs the message alone
            yield
    except KeyboardInterrupt as interrupt:
        say(f"\n{interrupt}" if interrupt.args else "\nInterrupted.")
        sys.exit(130)
    except FloatingPointError as error:
        say(str(error), "[red]Error[/red]")
        sys.exit(3)
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        say(str(error), "[red]Error[/red]")
        sys.exit(1)


def _warn(message: Warning | str, *_: Any) -> None:
    """A warning as a sentence, without the line of code that gave it."""
    say(str(message), "[yellow]Warning[/yellow]")
