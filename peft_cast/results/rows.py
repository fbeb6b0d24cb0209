"""What an evaluation measured: rows, their table, plot and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ..utils import replacing, write_json
from .paired import PAIRED_COLUMNS, Paired, spread


BASE = "base"


def is_base(adapter: str) -> bool:
    """Whether a row is of the untouched target, asked as the adapters are (`"base"`) or otherwise (`"base, ..."`)."""
    return adapter == BASE or adapter.startswith(f"{BASE}, ")


@dataclass(frozen=True)
class Measurement:
    """One model on one task.

    Args:
        adapter (`str`): Name of the adapter, `"base"` for the untouched target, `"base, NAME"` for the target asked
            with another prompt.
        run (`int`): Which of the adapter's runs (seeds), counted from 0.
        task (`str`): Name of the task; `"drift"` for the distance from the untouched target.
        metric (`str`): The metric that recovered lift is taken of.
        higher_is_better (`bool`): Its direction.
        metrics, samples, each: As in `Scores`.
    """

    adapter: str
    run: int
    task: str
    metric: str
    higher_is_better: bool
    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, str]] = ()
    each: Sequence[float] = ()


@dataclass(frozen=True)
class Row:
    """One adapter on one task, over its runs.

    Args:
        adapter, task, metric (`str`): As in `Measurement`.
        scores (`tuple[float, ...]`): The metric of each run.
        lift (`tuple[float, ...]`): Recovered lift of each run, `(score − base) / (retrained − base)`; empty where no
            retrained adapter was given or it gained nothing.
    """

    adapter: str
    task: str
    metric: str
    scores: tuple[float, ...]
    lift: tuple[float, ...]

    @property
    def mean_lift(self) -> float | None:
        """Recovered lift over the runs; `None` for the untouched target and where there is none."""
        return mean(self.lift) if self.lift and not is_base(self.adapter) else None

    @property
    def score_text(self) -> str:
        """Mean of the runs, with the standard deviation where there are several."""
        return _with_spread(self.scores)

    @property
    def lift_text(self) -> str:
        """Likewise for recovered lift; empty where there is none."""
        return "" if self.mean_lift is None else _with_spread(self.lift, 2)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns.

    Args:
        measurements (`tuple[Measurement, ...]`): Everything that was measured.
        retrained (`dict[str, str]`): For each task the name of the adapter that was trained on the target itself.
        settings (`dict`): Target, tasks, versions and machine, JSON-ready.
    """

    measurements: tuple[Measurement, ...]
    retrained: Mapping[str, str]
    settings: Mapping[str, Any]

    @property
    def rows(self) -> list[Row]:
        """One row per task and adapter, in the order they were given."""
        groups: dict[tuple[str, str], list[Measurement]] = {}
        for m in self.measurements:
            groups.setdefault((m.task, m.adapter), []).append(m)
        rows = []
        for (task, adapter), runs in groups.items():
            scores = tuple(m.metrics[m.metric] for m in runs)
            lift = self._lift(task, scores, runs[0].higher_is_better)
            rows.append(Row(adapter, task, runs[0].metric, scores, lift))
        return rows

    def _lift(self, task: str, scores: Sequence[float], higher_is_better: bool) -> tuple[float, ...]:
        base, top = (self._score(task, name) for name in (BASE, self.retrained.get(task)))
        # Without a gain there is nothing to recover, and the quotient would call a loss a success.
        if base is None or top is None or not (top > base if higher_is_better else top < base):
            return ()
        return tuple((score - base) / (top - base) for score in scores)

    def _score(self, task: str, adapter: str | None) -> float | None:
        found = [m.metrics[m.metric] for m in self.measurements if (m.task, m.adapter) == (task, adapter)]
        return mean(found) if found else None

    @property
    def adapters(self) -> list[str]:
        """Their names, the untouched target's among them, in the order they were given."""
        return list(dict.fromkeys(m.adapter for m in self.measurements))

    @property
    def judged(self) -> list[str]:
        """Those that are neither the target nor a retrained one."""
        return [name for name in self.adapters if not is_base(name) and name not in self.retrained.values()]

    @property
    def paired(self) -> list[Paired]:
        """Each adapter beside the untouched target on the same items, for tasks that say how each item went.

        The target is taken with the prompt that it does best with: a model that is worse than that was made worse.
        """
        groups: dict[tuple[str, str], list[Measurement]] = {}
        for m in self.measurements:
            if m.each:
                groups.setdefault((m.task, m.adapter), []).append(m)
        found = []
        for (task, adapter), runs in groups.items():
            of_base = [group[0] for (other, name), group in groups.items() if other == task and is_base(name)]
            if is_base(adapter) or not of_base:
                continue
            sign = 1 if runs[0].higher_is_better else -1
            best = max(of_base, key=lambda m: sign * m.metrics[m.metric])
            if all(len(run.each) == len(best.each) for run in runs):
                found.append(Paired.of(adapter, task, best.adapter, best.each, [run.each for run in runs]))
        return found

    def paired_table(self) -> str:
        """A markdown table of `paired`; empty where there is none."""
        if not (found := self.paired):
            return ""
        rows = [PAIRED_COLUMNS, ("---",) * len(PAIRED_COLUMNS), *(one.cells for one in found)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def row(self, adapter: str, task: str) -> Row:
        """The row of an adapter on a task.

        Raises:
            KeyError: If it was not measured.
        """
        for row in self.rows:
            if (row.adapter, row.task) == (adapter, task):
                return row
        raise KeyError(f"'{adapter}' was not measured on '{task}'.")

    def of(self, adapter: str | None = None) -> list[Row]:
        """The rows of one adapter, drift included.

        Args:
            adapter (`str`, *optional*): Its name; not needed if only one is neither the target nor a retrained one.

        Raises:
            ValueError: If there is no such adapter, or several could be meant.
        """
        if adapter is None and len(self.judged) == 1:
            adapter = self.judged[0]
        if adapter not in self.adapters:
            wanted = "Several adapters were evaluated" if adapter is None else f"'{adapter}' was not evaluated"
            raise ValueError(f"{wanted}: name one of {', '.join(self.adapters)}.")
        return [row for row in self.rows if row.adapter == adapter]

    def table(self) -> str:
        """A markdown table: adapters down, tasks across, recovered lift in brackets, mean ± spread over runs."""
        rows = {(row.adapter, row.task): row for row in self.rows}
        metrics = {row.task: row.metric.replace("_", " ") for row in rows.values()}
        lines = ["| | " + " | ".join(f"{task} ({metric})" for task, metric in metrics.items()) + " |"]
        lines.append("|---" * (len(metrics) + 1) + "|")
        for adapter in self.adapters:
            cells = [_cell(rows.get((adapter, task))) for task in metrics]
            lines.append(f"| {adapter} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n\n".join(part for part in (self.table(), self.paired_table()) if part)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: settings, raw measurements and the rows made of them."""
        return {
            "settings": dict(self.settings),
            "retrained": dict(self.retrained),
            "measurements": [asdict(m) for m in self.measurements],
            "rows": [asdict(row) for row in self.rows],
            "paired": [asdict(one) for one in self.paired],
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as a JSON file."""
        write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what `save` wrote."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(tuple(Measurement(**m) for m in data["measurements"]), data["retrained"], data["settings"])

    def plot(self, path: str | Path) -> None:
        """Bars of recovered lift per task and adapter, as a PNG, SVG or PDF file. Needs matplotlib.

        Raises:
            ValueError: If no row has a recovered lift.
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Plots need matplotlib: pip install 'peft-cast[eval]'.") from error
        panels: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.mean_lift is not None:
                panels.setdefault(row.task, []).insert(0, row)  # bars are drawn from below
        if not panels:
            raise ValueError("There is no recovered lift to plot: name the `retrained` adapter of the tasks.")
        heights = [len(rows) for rows in panels.values()]
        figure = Figure(figsize=(8, 0.6 + 0.34 * sum(heights)), layout="constrained")
        axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axis, (task, rows) in zip(axes, panels.items()):
            values = [row.mean_lift for row in rows]
            margins = [spread(row.lift) for row in rows]
            bars = axis.barh([row.adapter for row in rows], values, xerr=margins, color="#4477aa", height=0.7)
            axis.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=4, fontsize=8)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.axvline(1, color="gray", linewidth=0.8, linestyle="--")
            axis.margins(x=0.12)
            axis.set_title(task, fontsize=10, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
        axes[-1].set_xlabel("recovered lift (0: untouched target, 1: LoRA retrained on it)")
        with replacing(path) as partial:
            figure.savefig(partial, dpi=150)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.score_text} ({row.lift_text})" if row.lift_text else row.score_text


def _with_spread(values: Sequence[float], digits: int = 3) -> str:
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {spread(values):.{digits}f}" if len(values) > 1 else text
