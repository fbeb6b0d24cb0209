"""What an adapter holds and what becomes of it: the one description that every verb prints.

It is made of a configuration and the names and shapes in the file, without a model (`files.py`), or, exactly, of an
adapter that was read on its model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from ..align import split_name
from ..tuner.checks import number_of
from ..utils import unnamed, without_secrets
from .kinds import BASE, DEFAULT_RANK, EXACT_UP_TO, UNHEARD, beside_text


Fate = Literal["exact", "approximated", "measured", "left"]
Verb = Literal["translate", "plan", "Bridge.cast", "cast_file", "to_lora", "inspect"]
VERBS: tuple[Verb, ...] = ("translate", "plan", "Bridge.cast", "cast_file", "to_lora", "inspect")
# Settings that are said elsewhere, or that say nothing of what an adapter holds.
_SAID: tuple[str, ...] = ("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "kernels")
_SAID += ("inference_mode", "target_modules", "r", "lora_alpha", "runtime_config", "megatron_core", "projection_type")
_SAID += ("projection_size", "projection_bias", "projection_sharing", "not_carried", "auto_mapping")


@dataclass(frozen=True)
class Part:
    """A part of an adapter, and what becomes of it.

    Args:
        what (`str`): What it is.
        modules (`tuple[str, ...]`): On which modules of the model, by full names, or by the names in the configuration
            where there is no file.
        fate (`str`): Kernels carry it whole (`"exact"`) or the best of some rank of it (`"approximated"`), which of
            the two is seen when it is measured (`"measured"`), or no kernel expresses it (`"left"`).
        rank (`int`, *optional*): The largest of the kernels.
        error (`float`, *optional*): Of approximated kernels, where they are known: the mean of `‖ΔW − B A‖ / ‖ΔW‖`.
    """

    what: str
    modules: tuple[str, ...]
    fate: Fate
    rank: int | None = None
    error: float | None = None

    @property
    def outcome(self) -> str:
        """What kernels make of it."""
        if self.fate == "exact":
            return f"carried exactly (rank {self.rank})"
        if self.fate == "approximated":
            known = "" if self.error is None else f", mean relative error {self.error:.2g}"
            return f"approximated by rank {self.rank} (`source_rank`){known}"
        if self.fate == "measured":
            return f"carried exactly up to rank {EXACT_UP_TO}, else approximated by rank {self.rank} (`source_rank`)"
        if self.what.endswith(UNHEARD):
            return "not carried, no kernel expresses it: lost, also in `translate`, whose texts do not pass through it"
        if self.what == BASE:
            return "not carried where they differ from the base model's: imitated by the refinement, lost on a bridge"
        return "not carried, no kernel expresses it: imitated by the refinement of `translate`, lost on a bridge"


@dataclass(frozen=True)
class Holdings:
    """What an adapter holds and what becomes of it.

    Args:
        kind (`str`): Its type, with the options that make it more than a LoRA.
        options (`dict[str, str]`): Settings of its configuration that are not PEFT's defaults, in short.
        ranks (`tuple[int, ...]`): Those of its modules.
        parts (`tuple[Part, ...]`): What it holds.
        task_type, base_model, revision (`str`, *optional*): As its configuration says.
        read (`bool`): Whether kernels can be read from its file; else they are measured on the source's weights.
        refused (`str`, *optional*): Why it cannot be a source and what to do, what follows "it" in a sentence.
        is_known (`bool`): Whether the installed PEFT knows the type.
    """

    kind: str
    options: Mapping[str, str]
    ranks: tuple[int, ...]
    parts: tuple[Part, ...]
    task_type: str | None = None
    base_model: str | None = None
    revision: str | None = None
    read: bool = True
    refused: str | None = None
    is_known: bool = True

    @property
    def not_carried(self) -> list[dict[str, str]]:
        """Module and what of it no kernel expresses, JSON-ready."""
        return [{"module": module, "what": part.what} for part in self._left for module in part.modules]

    @property
    def reasons(self) -> dict[str, list[str]] | None:
        """The same by what it is, as a CAST adapter's configuration keeps it; `None` if all is carried."""
        return by_reason(self.not_carried) or None

    @property
    def _left(self) -> list[Part]:
        return [part for part in self.parts if part.fate == "left"]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        becomes_of = {part: "refused" if self.refused else part.outcome for part in self.parts}
        parts = [{**dataclasses.asdict(part), "becomes": becomes} for part, becomes in becomes_of.items()]
        becomes: dict[str, str] = {verb: self.on(verb) for verb in VERBS}
        return {
            **dataclasses.asdict(self),
            "parts": parts,
            "not_carried": self.not_carried,
            "verbs": becomes,
            "lines": self.lines(),
        }

    def lines(self) -> list[str]:
        """What it holds, in short lines."""
        parts = [_on(part) + ("" if self.refused else f": {part.outcome}") for part in self.parts]
        lines = [f"{'' if number else 'holds':<12} {text}" for number, text in enumerate(parts)]
        if self.options:
            lines.insert(0, "options      " + ", ".join(f"{name}={value}" for name, value in self.options.items()))
        if self.refused:
            return [*lines, f"as a source  cannot be a source: it {self.refused}"]
        how = "can be translated" if self.read else f"can be translated; {_NEEDS_WEIGHTS}"
        return [*lines, f"as a source  {how}"]

    @property
    def carried(self) -> str:
        """What kernels carry, in a few words."""
        if self.refused:
            return "nothing"
        return ", ".join(dict.fromkeys(part.outcome for part in self.parts if part.fate != "left"))

    def on(self, verb: Verb) -> str:
        """What a verb does with it, in a few words; "the rest" is what is not carried."""
        if self.refused:
            return {"inspect": "says why", "to_lora": "–"}.get(verb, "refused")
        if verb == "cast_file" and not self.read:
            return "refused: needs the source's weights"
        done = "yes"
        if not self.read:
            done = {"Bridge.cast": "with `source`", "plan": "yes, an estimate"}.get(verb, done)
        if not self._left:
            return done
        rest = {"Bridge.cast": "warns that the rest is lost"}
        if not all(part.what.endswith(UNHEARD) for part in self._left):
            rest["translate"] = "the refinement imitates the rest"
        rest["cast_file"] = rest["Bridge.cast"]
        return f"{done}, {rest.get(verb, 'names the rest')}"

    def lost(
        self,
        adapter: Any,
        without_place: Sequence[Mapping[str, str]] = (),
        on: str = "a bridge",
        remedy: str = "name one in `module_map` when the bridge is fitted",
    ) -> str | None:
        """What is lost of an adapter where nothing is trained, in a sentence; `None` if it is nothing.

        Args:
            adapter: Its name.
            without_place: Modules whose kernels do not land, and why (`what`).
            on: What carries it.
            remedy: What to do about modules without a place.
        """
        lost = []
        beside, left = ([p for p in self.not_carried if p["what"].endswith(UNHEARD) == one] for one in (True, False))
        if beside:
            lost.append(f"{list_not_carried(beside)}: use the adapter on its own model where that matters")
        if left:
            lost.append(
                f"{list_not_carried(left)}, which no kernel expresses and {on}, that trains nothing, "
                "does not imitate: use `translate`, whose refinement does"
            )
        if without_place:
            lost.append(
                f"the kernels of {number_of(len(without_place), 'module')}, which have no place on the target "
                f"({list_not_carried(without_place)}): {remedy}"
            )
        named = f"The adapter '{without_secrets(adapter)}'" if adapter else "The adapter"
        return f"{named} is not carried over whole; lost is {'; lost is '.join(lost)}." if lost else None


_NEEDS_WEIGHTS = (
    "its weight changes are measured on the source's weights, so `plan` estimates it and `cast_file` (`peft-cast "
    "cast`) refuses it: use `translate`, or `Bridge.cast` with `source`"
)


def by_reason(parts: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """The modules that were left behind, by why they were."""
    reasons: dict[str, list[str]] = {}
    for part in parts:
        reasons.setdefault(part["what"], []).append(part["module"])
    return reasons


def list_reasons(reasons: Mapping[str, Sequence[str]]) -> str:
    """`"trained bias (model.layers.0.q_proj and 5 more), ..."`"""
    return ", ".join(f"{what} ({_first(names)})" for what, names in reasons.items())


def list_not_carried(parts: Iterable[Mapping[str, str]]) -> str:
    """The same, of modules with their reasons."""
    return list_reasons(by_reason(parts))


def kernel_parts(what: str, found: Mapping[str, tuple[Fate, int | None, float | None]]) -> list[Part]:
    """Parts of the modules' kernels, one for each fate.

    Args:
        what: What the adapter is on them.
        found: Module name → fate, rank and error.
    """
    parts = []
    for fate in dict.fromkeys(fate for fate, _, _ in found.values()):
        modules = tuple(name for name, (one, _, _) in found.items() if one == fate)
        ranks = [rank for name in modules if (rank := found[name][1]) is not None]
        errors = [error for name in modules if (error := found[name][2]) is not None]
        rank, error = max(ranks, default=DEFAULT_RANK), fmean(errors) if errors else None
        parts.append(Part(what, modules, fate, rank, error if fate == "approximated" else None))
    return parts


def left_parts(found: Iterable[tuple[str, str]]) -> list[Part]:
    """Parts of module names with what no kernel expresses of them.

    PEFT saves the weights that an adapter on the head or on embeddings lies beside: of these modules that is said.
    """
    found = list(found)
    named = {module for module, what in found if what != BASE}
    found = [(module, what) for module, what in found if what != BASE or module not in named]
    reasons = by_reason({"module": module, "what": beside_text(what, module)} for module, what in found)
    return [Part(what, tuple(dict.fromkeys(modules)), "left") for what, modules in reasons.items()]


def options_of(config: PeftConfig) -> dict[str, str]:
    """The settings of a configuration that are not PEFT's defaults and that are not said elsewhere."""
    options = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in _SAID or field.name.startswith("source_") or value == default or value in (None, False):
            continue
        options[field.name] = _short(value)
    for name in unnamed(config):
        options[name] = f"{getattr(config, name)} (PEFT's default, {CONFIG_NAME} names none)"
    return options


def _short(value: Any) -> str:
    """A value of a configuration in at most 120 characters; sets have no lasting order."""
    names = isinstance(value, (set, frozenset, list)) and all(isinstance(item, str) for item in value)
    text = without_secrets(sorted(value) if names else value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _on(part: Part) -> str:
    """`"trained bias (model.layers.0.q_proj and 5 more)"`; kernels by the last part of the names."""
    if part.fate == "left":
        return f"{part.what} ({_first(part.modules)})"
    last = sorted({name.rsplit(".", 1)[-1] for name in part.modules})
    known = [name for name in part.modules if split_name(name)]  # the names of a configuration say of no layer
    count = f"{len(known)} " if known else ""
    names = ", ".join(last[:8]) + ", ..." * (len(last) > 8)
    return f"{part.what} on {count}linear layer{'s' * (len(known) != 1)} ({names})"


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
