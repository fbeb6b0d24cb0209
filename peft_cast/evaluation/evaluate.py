"""Run the comparison: adapters down, tasks across, recovered lift and drift."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import ranks
from ..arguments import check_arguments
from ..environment import environment
from ..files import write_json
from ..loading import with_adapter
from ..models import load_model, load_tokenizer, moved, untouched
from ..result import TranslationResult
from ..safety import without_secrets
from ..text import read_corpus
from .drift import drift
from .rows import BASE, Evaluation, Measurement
from .tasks import Scores, Task


Adapter: TypeAlias = str | Path | PeftModel | TranslationResult


def evaluate(
    target: str | Path | PreTrainedModel,
    adapters: Mapping[str, Adapter | Sequence[Adapter]],
    tasks: Sequence[Task],
    *,
    retrained: str | Mapping[str, str] | None = None,
    drift_text: Any = None,
    drift_samples: int = 32,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    output: str | Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compare adapters on a target model, the untouched target first.

    Recovered lift is `(adapter − base) / (retrained − base)`, with *retrained* a LoRA of the same rank that was trained
    on the target with the task data. Pass it as one of the adapters and name it.

    Args:
        target: The model the adapters are for: hub id, path or loaded model (given back as it was).
        adapters: Name → adapter: hub id, folder, PeftModel or what `translate` returned; or a list of them, the runs of
            several seeds, shown as mean ± standard deviation.
        tasks: `AnswerLikelihood`, `Classification`, `Generation`, `HarnessTask`, or anything that is a `Task`.
        retrained: Name of the retrained adapter, or a mapping from task name to it.
        drift_text: General text on which to measure how far each adapter moves the model from the untouched one (see
            `drift`): anything `translate(text=...)` takes as a corpus, but none that the translation has read, such as
            `Corpus("allenai/c4", name="en", split="validation")`. Not measured when `None`.
        drift_samples (`int`): How many documents of it.
        tokenizer: Needed only if it cannot be loaded from where the target comes from.
        device: Where to work: the accelerator when there is one, else the CPU.
        dtype: Precision of a model loaded here; bfloat16 where the hardware is fast at it, else float32.
        output: JSON file that every measurement is written to as soon as it is made. What it already holds, of the
            same target, task and adapter files, is not measured again; models, adapters and tasks in memory that have no
            lasting identity always are.
        progress (`bool`): Show a progress bar.

    Returns:
        `Evaluation`: Rows; `print` shows the table, `.plot(path)` draws it.

    Raises:
        ValueError: If names clash, a task or adapter cannot be used, or `retrained` names no adapter.
        OSError: If a model, adapter or data file cannot be reached.
    """
    check_arguments({"drift_samples": drift_samples, "dtype": dtype})
    runs = {n: list(a) if isinstance(a, (list, tuple)) else [a] for n, a in adapters.items()}
    retrained = _retrained(retrained, runs, tasks)
    device = ranks.begin(device)
    model = load_model(target, "target", device, dtype=dtype)
    tokenizer = load_tokenizer(tokenizer, model, "target")
    texts = read_corpus(drift_text, drift_samples) if drift_text is not None else []
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "`target` carries an adapter already, so it cannot be measured untouched: pass its hub id or folder, or take the "
            "adapter off first (`result.model.unload()`)."
        )
    settings = {
        "target": without_secrets(model.name_or_path),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tasks": [_describe(task) for task in tasks],
        "drift_documents": len(texts),
        "environment": environment(),
    }
    known = _Known(output)
    measurements: list[Measurement] = []
    jobs = [(BASE, 0, None)] + [(name, i, a) for name, group in runs.items() for i, a in enumerate(group)]
    for name, run, adapter in tqdm(jobs, desc="evaluate", disable=not progress):
        wanted: list[Task | None] = [*tasks, *([None] if texts and adapter is not None else [])]
        keys = [_key(target, settings, adapter, task, texts) for task in wanted]
        with ExitStack() as stack:
            adapted = None
            for task, key in zip(wanted, keys):
                scores = known.get(key)
                if scores is None:
                    if adapted is None:  # loaded only if there is something left to measure
                        stack.enter_context(moved(model, device))
                        adapted = stack.enter_context(_adapted(model, adapter))
                    scores = task.run(adapted, tokenizer) if task else Scores(drift(adapted, tokenizer, texts))
                    known.add(key, scores)
                measurements.append(_measurement(name, run, task, scores))
                known.write(Evaluation(tuple(measurements), retrained, settings))
    return Evaluation(tuple(measurements), retrained, settings)


def _measurement(adapter: str, run: int, task: Task | None, scores: Scores) -> Measurement:
    if task is None:
        return Measurement(adapter, run, "drift", "drift", False, scores.metrics)
    better = getattr(task, "higher_is_better", True)
    return Measurement(adapter, run, task.name, task.metric, better, scores.metrics, scores.samples)


def _retrained(retrained, runs: Mapping[str, list], tasks: Sequence[Task]) -> dict[str, str]:
    names = [task.name for task in tasks]
    if len(set(names)) < len(names) or "drift" in names:
        raise ValueError(f"Every task needs a name of its own, other than 'drift'; they are {names}.")
    if BASE in runs:
        raise ValueError(f"'{BASE}' is the name of the untouched target's row: name the adapter otherwise.")
    if retrained is None:
        return {}
    by_task = dict.fromkeys(names, retrained) if isinstance(retrained, str) else dict(retrained)
    for task, name in by_task.items():
        if name not in runs:
            raise ValueError(f"`retrained` names '{name}', which is none of the adapters {sorted(runs)}.")
        if task not in names:
            raise ValueError(f"`retrained` names the task '{task}', which is none of {names}.")
    return by_task


@contextmanager
def _adapted(model: PreTrainedModel, adapter: Adapter | None) -> Iterator[PreTrainedModel | PeftModel]:
    """The target with the adapter, in eval mode; afterwards the target is as it was."""
    given = adapter.model if isinstance(adapter, TranslationResult) else adapter
    if isinstance(given, PeftModel):
        own, wanted = given.get_base_model().config, model.config
        if (own.model_type, own.get_text_config().hidden_size) != (
            wanted.model_type,
            wanted.get_text_config().hidden_size,
        ):
            raise ValueError(
                f"A PeftModel among the adapters is on another model ('{given.get_base_model().name_or_path}') than the "
                f"target, '{model.name_or_path}'."
            )
        with untouched(given):
            yield given
        return
    with untouched(model), with_adapter(model, given) if given is not None else nullcontext(model) as adapted:
        yield adapted


def _describe(task: Task) -> dict[str, Any]:
    """The settings of a task, JSON-ready; data and functions by their fingerprints."""
    described: dict[str, Any] = {"kind": type(task).__name__, "name": task.name, "metric": task.metric}
    names: list[str] = [field.name for field in dataclasses.fields(task)] if dataclasses.is_dataclass(task) else []
    for name in names:
        value = getattr(task, name)
        if name == "data":
            value = _describe_data(value)
        described[name] = json.loads(json.dumps(value, default=_fingerprint))
    return described


def _describe_data(data: Any) -> str:
    if isinstance(data, (str, Path)):
        path = Path(data)
        return f"{path.name}, sha1 {hashlib.sha1(path.read_bytes()).hexdigest()}" if path.is_file() else str(data)
    return f"{len(data)} rows, sha1 {_sha1([dict(row) for row in data])}"


def _fingerprint(value: Any) -> str:
    """Functions by name and code, so that an edited one counts as another; everything else as text."""
    code = getattr(value, "__code__", None)
    if code is None:
        return str(value)
    return f"{value.__qualname__} {hashlib.sha1(code.co_code + repr(code.co_consts).encode()).hexdigest()[:12]}"


def _sha1(value: Any) -> str:
    return hashlib.sha1(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _key(target, settings, adapter: Adapter | None, task: Task | None, texts: list[str]) -> str | None:
    """What makes a measurement the same as another; `None` for what has no lasting identity: models and adapters in
    memory, tasks whose settings are not known."""
    if not isinstance(target, (str, Path)) or isinstance(adapter, (PeftModel, TranslationResult)):
        return None
    if task is not None and not dataclasses.is_dataclass(task):
        return None
    stamp: Any = None
    if adapter is not None:
        files = sorted(Path(adapter).glob("adapter_*"))
        stamp = [hashlib.sha1(file.read_bytes()).hexdigest() for file in files] or str(adapter)
    return _sha1([settings["target"], settings["dtype"], stamp, _describe(task) if task else texts])


class _Known:
    """Measurements in the output file, by key, so that a long run can be taken up again."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path is not None else None
        self.found: dict[str, Scores] = {}
        if self.path is not None and self.path.exists():
            try:
                known = json.loads(self.path.read_text(encoding="utf-8")).get("known", {})
            except json.JSONDecodeError as error:
                raise ValueError(f"`output`, '{self.path}', is no JSON file: remove it or choose another.") from error
            self.found = {key: Scores(**scores) for key, scores in known.items()}

    def get(self, key: str | None) -> Scores | None:
        return self.found.get(key) if key else None

    def add(self, key: str | None, scores: Scores) -> None:
        if key:
            self.found[key] = scores

    def write(self, evaluation: Evaluation) -> None:
        if self.path is None:
            return
        known = {key: dataclasses.asdict(scores) for key, scores in self.found.items()}
        write_json({**evaluation.to_dict(), "known": known}, self.path)
