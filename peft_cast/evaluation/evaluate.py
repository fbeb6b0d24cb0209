"""Run the comparison: adapters down, tasks across, recovered lift and drift."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from math import isfinite
from pathlib import Path
from typing import Any, TypeAlias

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..models import check_unwrapped, learned_positions, load_model, load_tokenizer, moved, skeleton_of, untouched
from ..options import OF_COMMANDS, Options, Pairing, Run, takes
from ..results import BASE, Evaluation, Measurement, TranslationResult, is_base
from ..source import check_on_target, refusal_to_run, why_idle, with_adapter
from ..text import read_corpus
from ..utils import as_path, as_place, check_output, distributed, environment, without_secrets, write_json
from ..utils.fields import check_count
from .drift import DRIFT_LENGTH, drift
from .tasks import Scores, Task


Adapter: TypeAlias = str | Path | PeftModel | TranslationResult
_DRIFT = ("drift", "drift", False)  # task, metric, whether more is better
_SIZES = ("hidden_size", "num_hidden_layers")  # by which models of a type are told apart


@takes(OF_COMMANDS["evaluate"])
def evaluate(
    target: str | Path | PreTrainedModel,
    adapters: Mapping[str, Adapter | Sequence[Adapter]],
    tasks: Sequence[Task],
    *,
    retrained: str | Mapping[str, str] | None = None,
    drift_text: Any = None,
    drift_samples: int = 32,
    output: str | Path | None = None,
    pairing: Pairing | None = None,
    run: Run | None = None,
    **options: Any,
) -> Evaluation:
    """Compare adapters on a target model, the untouched target first.

    Recovered lift is `(adapter − base) / (retrained − base)`, with *retrained* a LoRA of the same rank that was
    trained on the target with the task data. Pass it as one of the adapters and name it.

    Args:
        target: The model the adapters are for: hub id, path or loaded model (given back as it was).
        adapters: Name → adapter: hub id, folder, PeftModel or what `translate` returned; or a list of them, the runs
            of several seeds, shown as mean ± standard deviation.
        tasks: `AnswerLikelihood`, `Classification`, `Generation`, `HarnessTask`, or anything that is a `Task`.
        retrained: Name of the retrained adapter, or a mapping from task name to it.
        drift_text: General text on which to measure how far each adapter moves the model from the untouched one (see
            `drift`): anything `translate(text=...)` takes as a corpus, but none that the translation has read, such as
            `Corpus("allenai/c4", name="en", split="validation")`. Not measured when `None`.
        drift_samples (`int`): How many documents of it.
        output: JSON file that every measurement is written to as soon as it is made. What it already holds, of the
            same target, task and adapter files, is not measured again; models, adapters and tasks in memory that have
            no lasting identity always are.
        pairing, run, options: `target_tokenizer`, `target_revision`, `device`, `dtype` and `progress`, as in
            `translate`.

    Returns:
        `Evaluation`: Rows; `print` shows the table, `.plot(path)` draws it.

    Raises:
        ValueError: If names clash, a task or adapter cannot be used, or `retrained` names no adapter.
        OSError: If a model, adapter or data file cannot be reached, or `output` not written.
    """
    given = Options.of(options, evaluate, pairing=pairing, run=run)
    pairing = given.pairing
    check_count("drift_samples", drift_samples, 1)
    target, tasks, runs = as_path(target), _tasks(tasks), _runs(adapters)
    retrained = _retrained(retrained, runs, tasks)
    output = None if output is None else as_place(output, "output")
    known = _read_known(output)
    device = distributed.init(pairing.device)
    named = [one for group in runs.values() for one in group if isinstance(one, (str, Path))]
    check_on_target(target, *named, target_revision=pairing.target_revision)
    for name, group in runs.items():
        idle = (why_idle(one.model if isinstance(one, TranslationResult) else one) for one in group)
        if (why := next(filter(None, idle), None)) is not None:
            warnings.warn(f"The adapter '{name}' {why}.", stacklevel=2)
    tokenizer = load_tokenizer(pairing.target_tokenizer, target, "target", pairing.target_revision)
    if not tasks and (drift_text is None or not runs):
        raise ValueError("There is nothing to measure: pass `tasks`, or adapters and a `drift_text`.")
    for check in filter(None, (getattr(task, "check", None) for task in tasks)):
        check()
    there = skeleton_of(target, "target", pairing.target_revision)
    positions = learned_positions(there) if there is not None else None
    for check in filter(None, (getattr(task, "check_positions", None) for task in tasks if positions)):
        check(tokenizer, positions)
    texts = read_corpus(drift_text, drift_samples, "drift_text") if drift_text is not None else []
    model = load_model(target, "target", device, pairing.target_revision, pairing.dtype)
    for name, group in runs.items():
        for one in group:
            _check_base(name, one, model)
    settings = {
        "target": without_secrets(model.name_or_path),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tasks": [_describe(task) for task in tasks],
        "drift_documents": len(texts),
        "environment": environment(),
    }
    longest = min(DRIFT_LENGTH, positions or DRIFT_LENGTH)
    measured: list[Measurement] = []
    jobs = [(BASE, 0, None)] + [(name, i, a) for name, group in runs.items() for i, a in enumerate(group)]
    for name, number, adapter in tqdm(jobs, desc="evaluate", disable=not given.run.progress):
        wanted: list[tuple[str, Task | None]] = [(name, task) for task in tasks]
        if adapter is None:
            asked = [(prompt, other) for task in tasks for prompt, other in getattr(task, "for_base", dict)().items()]
            wanted += [(f"{BASE}, {prompt}", other) for prompt, other in asked]
        elif texts:
            wanted.append((name, None))
        keys = [_key(target, settings, adapter, task, texts) for _, task in wanted]
        with ExitStack() as stack:
            adapted = None
            for (row, task), key in zip(wanted, keys):
                kind = (task.name, task.metric, getattr(task, "higher_is_better", True)) if task else _DRIFT
                scores = known.get(key)
                if scores is None:
                    if adapted is None:  # loaded only if there is something left to measure
                        stack.enter_context(moved(model, device))
                        adapted = stack.enter_context(_adapted(model, adapter))
                    scores = (
                        task.run(adapted, tokenizer) if task else Scores(drift(adapted, tokenizer, texts, longest))
                    )
                    if not isfinite(scores.metrics[kind[1]]):
                        warnings.warn(
                            f"'{row}' gives NaN or infinite numbers on '{kind[0]}', as in a `dtype` too narrow for "
                            "the model: pass float32 or bfloat16."
                        )
                    if key:
                        known[key] = scores
                measured.append(Measurement(row, number, *kind, scores.metrics, scores.samples, scores.each))
                if output is not None:
                    so_far = Evaluation(tuple(measured), retrained, settings).to_dict()
                    kept = {key: dataclasses.asdict(scores) for key, scores in known.items()}
                    write_json({**so_far, "known": kept}, output)
    return Evaluation(tuple(measured), retrained, settings)


def _read_known(output: Path | None) -> dict[str | None, Scores]:
    """Measurements in the output file, by key, so that a long run can be taken up again."""
    if output is None:
        return {}
    check_output(output, "output")
    if not output.exists():
        return {}
    try:
        found = json.loads(output.read_text(encoding="utf-8"))
        if "measurements" not in found:  # such as a model's config.json, which would be overwritten
            raise ValueError
        return {key: Scores(**scores) for key, scores in found.get("known", {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"`output`, '{output}', is no JSON file of an evaluation: choose another.") from error


def _tasks(tasks: Any) -> list[Task]:
    found = list(tasks) if isinstance(tasks, Iterable) and not isinstance(tasks, (str, Mapping)) else None
    if found is None or any(isinstance(task, type) or not callable(getattr(task, "run", None)) for task in found):
        raise ValueError(
            f"`tasks` must be a list of tasks, such as `[AnswerLikelihood(...)]`, got {repr(tasks)[:200]}."
        )
    return found


def _runs(adapters: Any) -> dict[str, list[Adapter]]:
    """The adapters by name, each with its runs."""
    if not isinstance(adapters, Mapping):
        raise ValueError(
            "`adapters` must be a mapping from names to adapters, such as `{'translated': 'folder'}`, got "
            f"{repr(adapters)[:200]}."
        )
    runs = {name: as_path(a if isinstance(a, (list, tuple)) else [a]) for name, a in adapters.items()}
    for name, group in runs.items():
        if not name or not isinstance(name, str):
            raise ValueError(f"Every adapter needs a name, a text that is not empty, got {name!r}.")
        if not group:
            raise ValueError(f"The adapter '{name}' is an empty list: pass at least one run of it.")
        for one in group:
            if not isinstance(one, (str, Path, PeftModel, TranslationResult)):
                check_unwrapped(one, f"adapters['{name}']")
                raise ValueError(
                    f"The adapter '{name}' must be a folder, a hub id, a PeftModel or what `translate` returned, got "
                    f"{type(one).__name__}."
                )
    return runs


def _retrained(retrained, runs: Mapping[str, list], tasks: Sequence[Task]) -> dict[str, str]:
    names = [task.name for task in tasks]
    if len(set(names)) < len(names) or "drift" in names:
        raise ValueError(f"Every task needs a name of its own, other than 'drift'; they are {names}.")
    if taken := [name for name in runs if is_base(name)]:
        raise ValueError(f"'{taken[0]}' is the name of the untouched target's row: name the adapter otherwise.")
    if retrained is None:
        return {}
    if not isinstance(retrained, (str, Mapping)):
        raise ValueError(
            f"`retrained` must be the name of an adapter, or a mapping from tasks to names, got {retrained!r}."
        )
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
    if not isinstance(given, PeftModel):
        with untouched(model), with_adapter(model, given) if given is not None else nullcontext(model) as adapted:
            yield adapted
        return
    active = given.base_model.active_adapter
    wanted = adapter.adapter_name if isinstance(adapter, TranslationResult) else active
    changes = given.active_adapters not in (wanted, [wanted])  # several translations may share a model
    with untouched(given):
        if changes:
            given.base_model.set_adapter(wanted)
        try:
            yield given
        finally:
            if changes:
                given.base_model.set_adapter(active)


def _check_base(name: str, adapter: Adapter, model: PreTrainedModel) -> None:
    """Refuse an adapter in memory that cannot be compared on the target."""
    given = adapter.model if isinstance(adapter, TranslationResult) else adapter
    if not isinstance(given, PeftModel):
        return
    own = given.get_base_model()
    kinds = {
        (one.config.model_type, *(getattr(one.config.get_text_config(), size, None) for size in _SIZES))
        for one in (own, model)
    }
    if len(kinds) > 1:
        raise ValueError(
            f"A PeftModel among the adapters is on another model ('{own.name_or_path}') than the target, "
            f"'{model.name_or_path}'."
        )
    for config in map(given.peft_config.get, given.active_adapters):
        if (why := refusal_to_run(config, in_memory=True)) is not None:
            raise ValueError(f"The adapter '{name}' {why}.")


def _key(target, settings, adapter: Adapter | None, task: Task | None, texts: list[str]) -> str | None:
    """What makes a measurement the same as another; `None` for what has no lasting identity: models and adapters in
    memory, tasks whose settings are not known."""
    if not isinstance(target, (str, Path)) or isinstance(adapter, (PeftModel, TranslationResult)):
        return None
    if task is not None and not dataclasses.is_dataclass(task):
        return None
    files = sorted(Path(adapter).glob("adapter_*")) if adapter is not None else []
    stamp = [_sha1(file.read_bytes()) for file in files] or (None if adapter is None else str(adapter))
    return _sha1([settings["target"], settings["dtype"], stamp, _describe(task) if task else texts])


def _describe(task: Task) -> dict[str, Any]:
    """The settings of a task, JSON-ready; data and functions by their hashes."""
    described: dict[str, Any] = {"kind": type(task).__name__, "name": task.name, "metric": task.metric}
    names: list[str] = [one.name for one in dataclasses.fields(task)] if dataclasses.is_dataclass(task) else []
    for name in names:
        value = getattr(task, name)
        if name == "data" and not isinstance(value, (str, Path)):
            value = f"{len(value)} rows, sha1 {_sha1([dict(row) for row in value])}"
        elif name == "data":
            file = Path(value)
            value = f"{file.name}, sha1 {_sha1(file.read_bytes())}" if file.is_file() else str(value)
        described[name] = json.loads(json.dumps(value, default=_named))
    return described


def _named(value: Any) -> str:
    """Functions by name and code, so that an edited one counts as another; everything else as text.

    `datasets.fingerprint.Hasher` would take a function that can be imported by its name alone.
    """
    code = getattr(value, "__code__", None)
    if code is None:
        return str(value)
    return f"{value.__qualname__} {_sha1(code.co_code + repr(code.co_consts).encode())[:12]}"


def _sha1(value: Any) -> str:
    """Of bytes as they are, of others as JSON: the same in every process."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha1(data).hexdigest()
