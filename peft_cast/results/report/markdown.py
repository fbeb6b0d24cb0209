"""The short report: in markdown, for a model card or a pull request, and as plain text, for a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...source import list_reasons
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


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Of its heads and the rows."""
    lines = [[escaped(cell) for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_markdown(report: Contents) -> str:
    """Verdict, advice, tables and samples; the figures are on the page alone."""
    parts = [f"# {escaped(report.title)}", sentence(report.verdict)]
    if report.models:
        parts.append(table([("", ""), *report.models.items()]))
    if report.advice is not None:
        advice = "\n".join(f"- {sentence(text)}" for text in report.advice) or "Nothing stands out."
        parts += ["## What limits it, and what to do", advice]
    if report.tasks:
        parts += ["## On tasks", table(report.tasks)]
    if report.paired:
        parts.append(table(report.paired))
    if report.kl:
        rows = [("KL from the teacher on held-out text", "nats per position"), *(line[:2] for line in report.kl)]
        parts += ["## Distance from the adapted source", table(rows)]
    if report.samples:
        parts.append("## Samples")
        for sample in report.samples:
            for name, key in (("Prompt", "prompt"), ("Untouched target", "untouched"), ("Translated", "translated")):
                parts += [f"{name}:", quoted(sample[key])]
    if report.landing:
        landed = table([("role", "source", "target", "found by", "kernels"), *report.landing])
        parts += ["## Where kernels landed", landed]
    for title, reasons in report.left_out:
        lines = [f"- {escaped(why)}: {len(names)}, first {escaped(names[0])}" for why, names in reasons.items()]
        parts += [f"## {title}", "\n".join(lines)]
    if report.costs:
        parts += ["## Time and memory", table(report.costs)]
    return "\n\n".join(parts) + "\n"


def to_text(report: Contents) -> str:
    """The same in few lines, without samples and tasks."""
    lines = ["KL from the teacher on held-out text (nats per position; less is closer)"]
    lines += [f"  {name:<32}{value:>12}" for name, value in [*(line[:2] for line in report.kl), *report.facts]]
    lines += report.remarks
    if report.roles:
        lines.append("Closed form, held-out R² (mean over layers)")
        lines += [f"  {role:<32}{r2_in:>12}{r2_out:>12}" for role, r2_in, r2_out in report.roles]
    if report.landing:
        lines.append("Where kernels landed (role, source → target, found by name, shape or module_map)")
    for role, source, target, found, kernels in report.landing:
        lines.append(f"  {role:<5}{source} → {target}  × {kernels}{'' if found == 'name' else f'  (by {found})'}")
    lines += [f"{title}: {list_reasons(reasons)}" for title, reasons in report.left_out]
    if report.costs:
        lines.append(
            "Time  " + ", ".join(f"{phase} {float(seconds):.0f} s" for phase, seconds, *_ in report.costs[1:])
        )
    lines += [f"Note  {note}" for note in report.advice or ()]
    return "\n".join(lines)
