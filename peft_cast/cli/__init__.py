"""The command line: `peft-cast`, or `python -m peft_cast`."""

from .app import main


__all__ = ["main"]
