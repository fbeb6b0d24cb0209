"""Writes the tables of docs/options.md anew: `make options`."""

from pathlib import Path

from peft_cast.options import table


MARK = "<!-- options: made by make options -->\n"
PAGE = Path(__file__).with_suffix(".md")

if __name__ == "__main__":
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(f"{head}{MARK}\n{table()}", encoding="utf-8")
