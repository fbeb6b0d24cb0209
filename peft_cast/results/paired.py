"""An adapter beside the untouched target, item by item: what it turned right, what it turned wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from statistics import mean, stdev


# What `Paired.cells` gives.
PAIRED_COLUMNS = (
    "adapter",
    "task",
    "difference from the untouched target",
    "newly right",
    "newly wrong",
    "its prompt",
)


def spread(values: Sequence[float]) -> float:
    """The standard deviation: 0 of one value, NaN if one is not finite, of which `statistics` makes an error."""
    if not all(map(isfinite, values)):
        return nan
    return stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Paired:
    """One adapter and the untouched target on the same items.

    Args:
        adapter, task (`str`): Their names.
        base (`str`): The row of the untouched target it is compared with.
        items (`int`): How many items both did.
        difference (`float`): Mean over items of adapter − base, in units of the metric; several runs are averaged.
        margin (`float`): Half of the 95% confidence interval of the difference, 1.96 standard errors of the paired
            differences.
        gained, lost (`float`, *optional*): Positive and negative flips: items that only the adapted model, and only
            the untouched one, has right; a mean over several runs. `None` where an item is not just right or wrong.
    """

    adapter: str
    task: str
    base: str
    items: int
    difference: float
    margin: float
    gained: float | None = None
    lost: float | None = None

    @classmethod
    def of(
        cls, adapter: str, task: str, base: str, untouched: Sequence[float], runs: Sequence[Sequence[float]]
    ) -> Paired:
        """From the metric of each item, of the untouched target and of every run of the adapter, each (items,)."""
        differences = [mean(values) - before for before, *values in zip(untouched, *runs)]
        margin = 1.96 * spread(differences) / len(differences) ** 0.5
        flips: tuple[float | None, float | None] = (None, None)
        if all(value in (0, 1) for values in (untouched, *runs) for value in values):
            steps = [[after - before for before, after in zip(untouched, values)] for values in runs]
            flips = mean(run.count(1) for run in steps), mean(run.count(-1) for run in steps)
        return cls(adapter, task, base, len(differences), mean(differences), margin, *flips)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row under `PAIRED_COLUMNS`, as text."""
        flips = ("" if value is None else f"{value:g}" for value in (self.gained, self.lost))
        return (self.adapter, self.task, f"{self.difference:+.3f} ± {self.margin:.3f}", *flips, self.base)

    @property
    def sentence(self) -> str:
        """The flips in words; empty where there are none to count."""
        if self.gained is None:
            return ""
        return (
            f"On {self.task} it turns {self.gained:g} of {self.items} items right and {self.lost:g} wrong that the "
            "untouched target has the other way."
        )
