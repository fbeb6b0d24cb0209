"""What is translated and how, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.nn import Module
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..fit import Bridge, StackedPart, adapter_names, check_adapter_name, check_maps
from ..models import sharding
from ..options import Options
from ..refine import check_first_maps, check_folder, check_prompts, check_resumed
from ..source import check_pair, map_kernels
from ..text import check_all_reached, check_texts, is_written
from ..tuner.checks import shown
from ..utils import as_path, distributed


@dataclass(frozen=True)
class Job:
    """What is translated and how: the arguments of `translate`."""

    source: str | Path | PreTrainedModel | None
    adapter: str | Path | PeftModel | Sequence[str | Path]
    target: str | Path | PreTrainedModel
    text: Any = None
    bridge: Bridge | StackedPart | str | Path | None = None
    start: str | Path | None = None
    adapter_name: str | Sequence[str] = "default"
    options: Options = field(default_factory=Options)

    @classmethod
    def of(cls, source: Any, adapter: Any, target: Any, **arguments: Any) -> Job:
        """From what `translate` may be called with, all of it by name."""
        own = {name: as_path(arguments.pop(name)) for name in cls.__dataclass_fields__ if name in arguments}
        source, adapter, target = map(as_path, (source, adapter, target))
        return cls(source, adapter, target, **own, options=Options.of(arguments))

    @property
    def adapters(self) -> list[Any]:
        """All that are translated."""
        return list(self.adapter) if isinstance(self.adapter, (list, tuple)) else [self.adapter]

    @property
    def bar(self) -> partial:
        """A progress bar, or none."""
        return partial(tqdm, disable=not self.options.run.progress)

    @property
    def _texts(self) -> list[Any]:
        """All that may be imitated on: several adapters may have one each."""
        several = isinstance(self.adapter, (list, tuple)) and isinstance(self.text, Mapping)
        return list(self.text.values()) if several else [self.text]

    def arguments(self) -> dict[str, Any]:
        """All of it by name, the options one by one."""
        own = {name: value for name, value in vars(self).items() if name != "options"}
        return {**own, **self.options.values()}

    def check(self) -> None:
        """Everything about the arguments that can be told without loading a model.

        Raises:
            ValueError, OSError: As `translate`.
        """
        pairing, training = self.options.pairing, self.options.training
        if not self.adapters:
            raise ValueError("`adapter` is an empty list: pass at least one adapter.")
        distributed.resolve_source_device(pairing.source_device, distributed.training_device(pairing.device))
        check_folder(self.options.run, self.source, *self.adapters, self.target, self.start)
        check_texts(self._texts, self.options.fit.fit_text)
        written = self.text is None or isinstance(self.text, Mapping) or is_written(self.text)
        check_prompts(training, written)
        shard = sharding.is_requested(training.training_args)
        distributed.batch_per_process(training.batch_size)
        if isinstance(self.adapter, (list, tuple)):
            _check_several(self, shard)
        else:
            self._check_one(shard)
            check_resumed(self.options, text=self.text, start=self.start, adapter_name=self.adapter_name)
        # What lies on disk or on the hub comes last: it may have to be fetched.
        check_pair(self.source, self.adapters, self.target, pairing, self._check_places, training.max_length)
        check_maps(self.bridge, self.start, self.source, self.adapter, self.target, self.options)
        if not self.options.run.resume_from_checkpoint:  # which has its texts kept
            check_all_reached(self._texts, self.options.fit.fit_text)

    def _check_places(
        self, places: Iterable[str], source: PreTrainedModel, target: PreTrainedModel, *given: Any
    ) -> None:
        modules = map_kernels(places, source, target, *given)
        if self.bridge is None and self.start is None:  # which bring the first maps
            check_first_maps(modules, source, target, self.options)

    def _check_one(self, shard: bool) -> None:
        training = self.options.training
        check_adapter_name(self.adapter_name)
        if self.bridge is not None and training.beta > 0:
            raise ValueError(
                "A bridge has no maps between hidden states, which `beta` needs: pass `beta=0` or no `bridge`."
            )
        if shard and (training.on_policy_steps or training.teacher == "shown"):
            raise ValueError("`on_policy_steps` and `teacher='shown'` go with no FSDP or ZeRO-3: leave them out.")
        if self.start is not None and (self.bridge is not None or training.beta > 0 or shard):
            raise ValueError("`start` goes with no `bridge`, no `beta` and no FSDP or ZeRO-3: leave it or them out.")


def _check_several(job: Job, shard: bool) -> None:
    """Refuse what goes with one adapter alone."""
    for adapter in job.adapters:
        if isinstance(adapter, Module):
            raise ValueError("Several adapters must be folders or hub ids, not PeftModels: save them first.")
        if not isinstance(adapter, (str, Path)):
            raise ValueError(f"Several adapters must be folders or hub ids, got {shown(adapter)} among them.")
    for name in ("bridge", "start"):
        if getattr(job, name) is not None:
            raise ValueError(f"`{name}` is for one adapter at a time: pass no `{name}`.")
    if job.options.training.beta > 0 or job.options.pairing.depth_map == "similarity":
        raise ValueError("`beta` and `depth_map='similarity'` are for one adapter at a time: translate them in turn.")
    if shard:
        raise ValueError("FSDP and ZeRO-3 are for one adapter at a time: translate them in turn.")
    names = adapter_names(job.adapters, job.adapter_name)
    check_resumed(job.options, text=job.text, adapter_name=names)
    for other in (other for other in (job.text if isinstance(job.text, Mapping) else ()) if other not in names):
        raise ValueError(f"`text` has a text for '{other}', which is the name of no adapter: {', '.join(names)} are.")
    for name in names:
        check_folder(in_subfolder(job.options, name).run, job.source, *job.adapters, job.target)
        text_for(job.text, name)


def in_subfolder(options: Options, name: str) -> Options:
    """The options of one of several adapters, which has a subfolder of its name."""
    folder = options.run.output_dir
    return options.but(output_dir=None if folder is None else Path(folder) / name)


def text_for(text: Any, name: str) -> Any:
    """The text of one of several adapters."""
    if not isinstance(text, Mapping):
        return text
    if name not in text:
        raise ValueError(f"`text` has no text for the adapter '{name}': it has {', '.join(map(str, text)) or 'none'}.")
    return text[name]
