"""The short report in markdown, for a model card or a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .contents import Contents, with_code


def escaped(value: Any) -> str:
    """Plain text as one line of markdown that shows it and does nothing else."""
    text = re.sub(r"\s+", " ", str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~!$]|(?<=\])\()", r"\\\1", text)


def sentence(text: str) -> str:
    """The same, but names in backticks stay code."""
    return "".join(part if code else escaped(part) for part, code in with_code(text))


def quoted(text: str) -> str:
    """Plain text of several lines as a block of code that nothing in it can end."""
    fence = "`" * (max([2, *(len(run) for run in re.findall("`+", text))]) + 1)
    return f"{fence}text\n{text}\n{fence}"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [[escaped(cell) for cell in row] for row in (heads, *rows)]
    lines.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_markdown(report: Contents) -> str:
    """Verdict, advice, tables and samples; the figures are on the page alone."""
    parts = [f"# {escaped(report.title)}", sentence(report.verdict)]
    if report.models:
        parts.append(table(["", ""], list(report.models.items())))
    if report.advice is not None:
        advice = "\n".join(f"- {sentence(text)}" for text in report.advice) or "Nothing stands out."
        parts += ["## What limits it, and what to do", advice]
    if report.tasks:
        parts += ["## On tasks", table(report.tasks[0], report.tasks[1:])]
    if report.kl:
        heads = ["KL from the teacher on held-out text", "nats per position"]
        parts += ["## Distance from the adapted source", table(heads, [line[:2] for line in report.kl])]
    if report.samples:
        parts.append("## Samples")
        for sample in report.samples:
            for name, key in (("Prompt", "prompt"), ("Untouched target", "untouched"), ("Translated", "translated")):
                parts += [f"{name}:", quoted(sample[key])]
    if report.landing:
        heads = ["role", "source", "target", "found by", "kernels"]
        parts += ["## Where kernels landed", table(heads, report.landing)]
    for title, reasons in (("Found no place", report.unplaced), ("Expressed by no kernel", report.not_carried)):
        if reasons:
            lines = [
                f"- {escaped(reason)}: {len(modules)}, first {escaped(modules[0])}" for reason, modules in reasons
            ]
            parts += [f"## {title}", "\n".join(lines)]
    if report.costs:
        parts += ["## Time and memory", table(report.costs[0], report.costs[1:])]
    return "\n\n".join(parts) + "\n"
