"""Which module of the source each tensor of an adapter's file belongs to, also where the file calls it otherwise.

A file's tensors are named after the model as it was while it was saved: compiled, wrapped for training, without its
head, or as an older version of transformers had it. What differs so is the way to the layers. It is left out of the
comparison, and a name counts as found only if every tensor of its group lands on a module of the right shape, at one
place alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from peft import AdaLoraConfig, LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from transformers import PreTrainedModel

from ..align import SENSES
from ..models import as_peft_reads
from ..tuner import CastConfig
from ..tuner.checks import TensorInfo
from ..tuner.quantized import linear_size
from ..utils import replicated_layers


ROOT = ("base_model", "model")  # PEFT's own wrappers
# What training puts around modules, and what that says of the file.
WRAPPERS = {
    "_orig_mod": "saved from a compiled model",
    "_fsdp_wrapped_module": "saved from a model wrapped by FSDP",
    "_checkpoint_wrapped_module": "saved from a model wrapped for activation checkpointing",
    "_forward_module": "saved from a model wrapped by Lightning",
    "module": "saved from a model wrapped by DDP or DeepSpeed",
    "pretrained_model": "saved from a model wrapped by TRL",
}
# Steps on the way to the layers that say nothing of which layers they are.
_LANGUAGE = {"language_model", "text_model", "llm", "lm", "backbone", "transformer"}
_NEUTRAL = {*ROOT, *WRAPPERS, *_LANGUAGE, "default", "wrapped_model", "policy", "actor", "student"}
OTHER_TOWERS = re.compile(f"{SENSES.pattern}|encoder|decoder|draft|critic|value|reward|teacher|ref")
# Behind them a name speaks of what PEFT puts into a module, no longer of the module.
_INNER = ("base_layer", "modules_to_save", "original_module", "token_adapter")
WITH_NAMES = re.compile(r"lora_(embedding_)?[AB]|lora_magnitude_vector")
BRIDGED = "bridge's source"  # a model that is no argument: what a bridge keeps of it
_MOST_GROUPS = 500  # of tensors whose way to the layers is the same; no model has as many


class Part(NamedTuple):
    """A tensor of the file: the way to its layer, its module from the layer's number on, and what it is there."""

    key: str
    head: tuple[str, ...]
    tail: tuple[str, ...]
    inner: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def named(self) -> str:
        """What it is called in a message."""
        return f"'{self.key[:200]}' of shape {self.shape}"

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to one expert, as models of transformers 4 had them."""
        return any(a == "experts" and b.isdigit() for a, b in zip(self.tail, self.tail[1:]))


@dataclass(frozen=True)
class Renaming:
    """What the tensors of a file are read as.

    Args:
        names (`dict[str, str | None]`): Name in the file → name that PEFT expects; `None` for one that is left out.
        modules (`dict[str, str]`): Of the adapted modules, name in the file → name in the model.
        said (`str`, *optional*): A sentence for the user, if a tensor is read under another name.
    """

    names: dict[str, str | None]
    modules: dict[str, str]
    said: str | None


class Match:
    """An adapter's file beside the modules of its model.

    Args:
        header: Of the file.
        source: The model, without the adapter.
        config: The adapter's configuration.
        which (`str`): The argument that the model is passed as, or `BRIDGED`.
    """

    def __init__(
        self, header: Mapping[str, TensorInfo], source: PreTrainedModel, config: PeftConfig, which: str = "source"
    ):
        self.header, self.source, self.config, self.which = header, source, config, which
        self.modules = {name: linear_size(module) for name, module in source.named_modules() if name}
        self.is_lora = isinstance(config, LoraConfig)
        self.prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) or "\0"
        self.neutral = _NEUTRAL | set(source.base_model_prefix.split("."))
        self.layers = replicated_layers(config)
        self.parts = [self._part(key, info.shape) for key, info in header.items()]

    @property
    def model(self) -> str:
        """What the model is called in a message."""
        return f"the model ({type(self.source).__name__})"

    @cached_property
    def tuned(self) -> list[Part]:
        """The adapter's own tensors, without those of the base model."""
        return [part for part in self.parts if any(step.startswith(self.prefix) for step in part.inner)]

    @cached_property
    def adapter_names(self) -> set[str]:
        """Names of adapters that were left in the tensors' names."""
        following = []
        for part in self.parts:
            at = next((i for i, step in enumerate(part.inner) if step.startswith(self.prefix)), None)
            if at is None or (self.is_lora and not WITH_NAMES.fullmatch(part.inner[at])):
                continue
            step = part.inner[at + 1] if len(part.inner) > at + 1 else "weight"
            following.append(None if step in ("weight", "bias") or step.isdigit() else step)
        return set() if not self.is_lora and len(set(following)) > 1 else {step for step in following if step}

    @cached_property
    def twins(self) -> tuple[Part, Part] | None:
        """Two of the adapter's tensors that would be one in PEFT."""
        found: dict[Any, Part] = {}
        for part in self.tuned:
            other = found.setdefault((part.head, part.tail, self._inner(part)), part)
            if other is not part:
                return other, part
        return None

    @cached_property
    def heads(self) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
        """Ways to layers, and single modules outside of them, in the model, by what is left without neutral steps."""
        found: dict[tuple[str, ...], dict[tuple[str, ...], None]] = defaultdict(dict)
        for name in self.modules:
            head, _ = halves(name.split("."))
            found[self.reduced(head)][head] = None
        return {reduced: list(heads) for reduced, heads in found.items()}

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The embeddings and the head, with their rows."""
        parts = (self.source.get_input_embeddings(), self.source.get_output_embeddings())
        return {name: len(part.weight) for name, part in self.source.named_modules() for own in parts if part is own}

    @cached_property
    def stacks(self) -> list[tuple[str, ...]]:
        """Ways to layers in the model."""
        return list(dict.fromkeys(head for head, tail in (halves(n.split(".")) for n in self.modules) if tail))

    @cached_property
    def groups(self) -> dict[tuple[str, ...], list[Part]]:
        groups: dict[tuple[str, ...], list[Part]] = defaultdict(list)
        for part in self.parts:
            groups[part.head].append(part)
        return dict(groups)

    def reduced(self, head: Iterable[str]) -> tuple[str, ...]:
        return tuple(step for step in _from_root(tuple(head)) if step not in self.neutral)

    def module(self, head: tuple[str, ...], part: Part) -> str | None:
        """The model's module that a tensor is on, if the way to the layers is `head`."""
        if self.is_lora and not part.head and not part.tail:  # a tensor beside all modules
            return None
        for tail in (part.tail, tuple(step for step in part.tail if step not in WRAPPERS)):
            name = ".".join(head + tail)
            if self.layers and tail and int(tail[0]) < len(self.layers):
                base = ".".join((*head, str(self.layers[int(tail[0])]), *tail[1:]))
                if base in self.modules:
                    return name
            if name in self.modules:
                return name
        return None

    def fits(self, module: str, part: Part) -> bool:
        """Whether a LoRA's matrix has the width of the module; of other tensors, and of how many tokens there are,
        nothing is known here.
        """
        size = self.modules.get(module)
        special = getattr(self.config, "use_bdlora", None) or getattr(self.config, "target_parameters", None)
        if not self.is_lora or size is None or special or len(part.shape) != 2 or "base_layer" in part.inner:
            return True
        if "lora_A" in part.inner:
            return part.shape[1] == size[0]
        return "lora_B" not in part.inner or part.shape[0] == size[1] or module in self.vocabulary

    def lands(self, head: tuple[str, ...], group: Iterable[Part], experts: bool = False) -> bool:
        """Whether every tensor of a group has its module; `experts` takes those that PEFT will fuse on trust."""
        for part in group:
            if experts and part.is_expert and ".".join((*head, part.tail[0])) in self.modules:
                continue
            module = self.module(head, part)
            if module is None or not self.fits(module, part):
                return False
        return True

    @cached_property
    def renaming(self) -> Renaming | None:
        """The names under which every tensor lands; `None` if there are none, or those of the file are right."""
        if not self.header or isinstance(self.config, CastConfig) or len(self.adapter_names) > 1:
            return None
        if self.as_it_is or len(self.groups) > _MOST_GROUPS:
            return None
        found = self._renamed(experts=False)
        if found is None and not self.read_by_peft and any(part.is_expert for part in self.parts):
            found = self._renamed(experts=True)
        return found

    @cached_property
    def as_it_is(self) -> bool:
        """Whether every tensor lands under the name that it has."""
        return all(self._own(part) for part in self.parts)

    @cached_property
    def read_by_peft(self) -> bool:
        """Whether every tensor lands after what PEFT itself does to files of transformers 4."""
        try:
            read = as_peft_reads(self.source, self.config, {key: info.shape for key, info in self.header.items()})
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError):
            return False
        return read.keys() != self.header.keys() and all(self._own(self._part(*item)) for item in read.items())

    def _own(self, part: Part) -> bool:
        if part.head[:2] != ROOT:  # what all modules share lies beside them
            return not self.is_lora and part.head == ROOT[:1]
        head = part.head[2:]
        return (
            ".".join(head + part.tail) in self.modules or bool(self.layers and self.module(head, part))
        ) and self._inner(part) == part.inner

    def _renamed(self, experts: bool) -> Renaming | None:
        names: dict[str, str | None] = {}
        modules: dict[str, str] = {}
        for head, group in self.groups.items():
            if not self.is_lora and not self.reduced(head) and not any(part.tail for part in group):
                names |= {part.key: ".".join((ROOT[0], *(self._inner(part) or ()))) for part in group}  # shared by all
                continue
            candidates = self.heads.get(self.reduced(head), [])
            landing = [new for new in candidates if self.lands(new, group, experts)]
            if len(landing) > 1:
                landing = [new for new in landing if ROOT + new == head]
            if len(landing) != 1:
                return None
            for part in group:
                module = self.module(landing[0], part) or ".".join(landing[0] + part.tail)
                inner = self._inner(part)
                names[part.key] = None if inner is None else ".".join((*ROOT, module, *inner))
                if inner and any(step.startswith(self.prefix) for step in inner):
                    modules[".".join(part.head + part.tail)] = module
        kept = [new for new in names.values() if new is not None]
        if len(set(kept)) < len(kept) or all(old == new for old, new in names.items()):
            return None
        return Renaming(names, modules, self._said(names))

    def _part(self, key: str, shape: tuple[int, ...]) -> Part:
        steps = key.split(".")
        inner = (i for i, step in enumerate(steps) if step in _INNER or step.startswith(self.prefix))
        at = next(inner, len(steps) - 1)
        head, tail = halves(steps[:at])
        return Part(key, head, tail, tuple(steps[at:]), shape)

    def _inner(self, part: Part) -> tuple[str, ...] | None:
        """What PEFT calls a tensor within its module: without the adapter's name; `None` if it saves none such."""
        inner = part.inner
        if inner[0] == "original_module":
            return None
        if inner[0] == "modules_to_save":
            if part.key.replace(f".{'.'.join(inner[:2])}.", ".") in self.header:  # as with biases, saved twice
                return None
            return inner[2:] if len(inner) > 2 else inner
        for at in range(1, len(inner)):
            tuned = inner[at - 1].startswith(self.prefix) or inner[at - 1].startswith("trainable_tokens_")
            if tuned and inner[at] in self.adapter_names:
                inner = inner[:at] + inner[at + 1 :]
                break
        if self.is_lora and not isinstance(self.config, AdaLoraConfig) and inner[-1] in ("lora_A", "lora_B"):
            return (*inner, "weight")
        if inner[-2:] == ("lora_magnitude_vector", "weight"):
            return inner[:-1]
        return inner

    def _said(self, names: Mapping[str, str | None]) -> str | None:
        if not (changed := {old: new for old, new in names.items() if new and new != old}):
            return None  # some are left out, which the model has too
        old = min(changed)
        new = changed[old]
        steps, kept = old.split("."), new.split(".")
        reasons = [why for step, why in WRAPPERS.items() if steps.count(step) > kept.count(step)]
        if steps.count("base_model") > 1:
            reasons.append("wrapped by PEFT twice")
        elif "base_model" not in steps:
            reasons.append("without PEFT's 'base_model.model.'")
        if self.adapter_names:
            reasons.append(f"with the adapter's name '{next(iter(self.adapter_names))}'")
        elif steps[-1] in ("lora_A", "lora_B"):
            reasons.append("without '.weight'")
        if _after("language_model", steps) != _after("language_model", kept):
            reasons.append("of another version or part of a vision-language model")
        elif not reasons:
            shorter = len(steps) < len(kept)
            reasons.append("of the model without its head" if shorter else "with another prefix")
        return f"The adapter's tensors are named '{old}' ({', '.join(reasons)}): they were read as '{new}'."


def halves(steps: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A module's name before and from the first number on."""
    at = next((i for i, step in enumerate(steps) if step.isdecimal() and step.isascii()), len(steps))
    return tuple(steps[:at]), tuple(steps[at:])


def _from_root(head: tuple[str, ...]) -> tuple[str, ...]:
    """Without what lies around the adapted model, which may be one part of a larger one."""
    if ROOT[0] not in head:
        return head
    at = len(head) - 1 - head[::-1].index(ROOT[0])
    return head if any(OTHER_TOWERS.search(step) for step in head[:at]) else head[at:]


def _after(step: str, steps: list[str]) -> str | None:
    return steps[steps.index(step) + 1] if step in steps[:-1] else None
