"""What a person sees: results on stdout, all else on stderr, and every end a sentence and an exit code."""

from __future__ import annotations

import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from typer import Abort
from typer.core import TyperGroup

from ..utils.importing import when_imported
from ..utils.secrets import without_secrets


_PACKAGE = Path(__file__).parents[1]
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
        when_imported("transformers", lambda: sys.modules["transformers"].logging.disable_progress_bar())
        when_imported("datasets", lambda: sys.modules["datasets"].disable_progress_bars())


@contextmanager
def _ending_well() -> Iterator[None]:
    when_imported("transformers", lambda: sys.modules["transformers"].logging.set_verbosity_error())
    # What it says of a broken file, the error says too.
    when_imported("datasets", lambda: sys.modules["datasets"].logging.set_verbosity(logging.CRITICAL))
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
    except _foreseen() as error:
        say(str(error), "[red]Error[/red]")
        sys.exit(1)
    except Exception as error:
        if isinstance(error, Abort) or hasattr(error, "exit_code"):  # the command line's own
            raise
        say(_unforeseen(error), "[red]Error[/red]")
        sys.exit(1)


def _foreseen() -> tuple[type[Exception], ...]:
    """The errors whose message is a sentence; PyTorch's own can be among them where it has been imported."""
    torch = sys.modules.get("torch")
    return (ValueError, OSError, ImportError, *([torch.OutOfMemoryError] if torch else []))


def _unforeseen(error: Exception) -> str:
    """What is said of an error that should have been a sentence: where it comes from, and what to do."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in Path(frame.filename).parents]
    where = f" in {Path(own[-1].filename).relative_to(_PACKAGE).as_posix()}, line {own[-1].lineno}" if own else ""
    said = without_secrets(" ".join(str(error).split()))[:500]
    return (
        f"{type(error).__name__}{where}: {said or 'no more is known'}. This should have been a sentence that says "
        "what to do: please report it, with the command and this line, as an issue of peft-cast."
    )


def _warn(message: Warning | str, *_: Any) -> None:
    """A warning as a sentence, without the line of code that gave it."""
    say(str(message), "[yellow]Warning[/yellow]")
