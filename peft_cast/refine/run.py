"""What a translation keeps in its folder, so that a killed one goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch

from ..align import AlignedPair
from ..models import fingerprint
from ..options import Options, Run
from ..results import TranslationResult
from ..source import Pair
from ..text import PairTexts, TextSample
from ..utils import (
    check_place,
    check_writable,
    distributed,
    optional,
    read_json_if_there,
    remove_partial,
    replacing,
    unwritten,
    why_unwritten,
    without_secrets,
    write_json,
)
from .checkpoints import checkpoints, last_checkpoint, read_state


# Of Trainer's arguments those that do not change the result.
FREE_TRAINING_ARGS = ("fsdp", "deepspeed", "logging_", "save_", "report_to", "run_name", "disable_tqdm")


class NotSavedError(OSError):
    """The finished translation could not be written.

    Attributes:
        result (`TranslationResult`): The translation, to be saved elsewhere.
    """

    def __init__(self, message: str, result: TranslationResult) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class RunFolder:
    """A translation's folder.

    Args:
        folder (`Path`, *optional*): `output_dir`; nothing is kept when `None`.
        cache (`Path`, *optional*): Where the closed form and the teacher's predictions are kept.
        checkpoint (`Path`, *optional*): Where the refinement goes on from.
        begun (`bool`): Whether it begins here, and does not go on with one that was there.
    """

    folder: Path | None = None
    cache: Path | None = None
    checkpoint: Path | None = None
    begun: bool = True

    def texts(self, read: Callable[[], PairTexts], name: str = "texts") -> PairTexts:
        """The texts kept in the folder under a name, else those that `read` gives, which are kept."""
        if self.folder is None:
            return read()
        file = _work(self.folder) / f"{name}.json"
        kept = distributed.on_main_process(lambda: read_json_if_there(file))
        if kept is not None:
            return _texts(kept)
        texts = read()
        if distributed.is_main_process():
            with optional("The text"):
                parts = {part: value for part, value in vars(texts).items() if part != "metrics"}
                kept = {part: [vars(text) for text in value] for part, value in parts.items()}
                _write_as_is({**kept, "metrics": texts.metrics}, file)
                shutil.rmtree(self._parts, ignore_errors=True)
        return texts

    def written(self, key: str, write: Callable[[], list[str]]) -> list[str]:
        """A batch of written text kept in the folder, else what `write` gives, which is kept until all is written."""
        if self.folder is None:
            return write()
        file = self._parts / f"{key}.json"
        kept = distributed.on_main_process(lambda: read_json_if_there(file))
        if isinstance(kept, list):
            return kept
        batch = write()
        if distributed.is_main_process():
            with optional("A part of the written text"):
                _write_as_is(batch, file)
        return batch

    @property
    def on_policy(self) -> Path | None:
        """Where the refinement on the translated model's own words keeps its checkpoints; nowhere when `None`."""
        return None if self.folder is None else _work(self.folder) / "on_policy"

    @property
    def on_policy_checkpoint(self) -> Path | None:
        """Where that goes on from."""
        return None if self.on_policy is None else last_checkpoint(self.on_policy / "checkpoints")

    @property
    def _parts(self) -> Path:
        return _work(self.folder or Path()) / "written"

    def save(self, result: TranslationResult) -> None:
        """Save the result, mark the run as finished and remove what only an unfinished one needs.

        Raises:
            NotSavedError: If it cannot be written.
        """
        if self.folder is None:
            return
        try:
            distributed.on_main_process(partial(result.save_pretrained, self.folder))
        except (OSError, ValueError) as error:  # something else may have come there since
            raise NotSavedError(
                f"The translation is finished but could not be saved to '{self.folder}' ({why_unwritten(error)}): "
                "mend that and pass `resume_from_checkpoint=True`, or catch this error and call "
                "`error.result.save_pretrained(...)` with another folder.",
                result,
            ) from error
        self.finish()

    def finish(self) -> None:
        """Mark the run as finished, and remove what only an unfinished one needs."""
        if self.folder is not None:
            distributed.on_main_process(partial(_finish, self.folder))

    @contextmanager
    def advising(self) -> Iterator[None]:
        """Within the context Ctrl-C says how to go on."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            if self.folder is not None:
                last = last_checkpoint(self.folder / "checkpoints"), self.on_policy_checkpoint
                steps = sum(read_state(checkpoint).global_step for checkpoint in last if checkpoint)
                reached = f" up to step {steps}" if steps else ""
                interrupt.args = (
                    f"Stopped; what was done{reached} is kept in '{self.folder}'. To go on, call `translate` with the "
                    "same arguments and `resume_from_checkpoint=True` (`--resume` on the command line).",
                )
            raise


def _finish(folder: Path) -> None:
    file = folder / "run.json"
    with optional("The note that the run is finished"):
        write_json({**(read_json_if_there(file) or {}), "finished": True}, file)
    for file in _work(folder).glob("predictions_*"):
        file.unlink(missing_ok=True)


def check_folder(run: Run, *inputs: Any) -> None:
    """Refuse what can be refused before anything is loaded.

    Args:
        run (`Run`): Its folder, and whether to go on with what is there.
        inputs: What is read: models, adapters or names of them.

    Raises:
        ValueError: If there is nothing to resume in, or what is read, another adapter, a model or an unfinished run
            would be overwritten.
        OSError: If the folder cannot be written.
    """
    check_cache(run)
    output_dir, resume = run.output_dir, run.resume_from_checkpoint
    if output_dir is None:
        if resume:
            raise ValueError("`resume_from_checkpoint` needs `output_dir`, the folder of the run to go on with.")
        return
    folder = Path(output_dir)
    check_place(folder, *inputs)
    known, last = _known(folder), last_checkpoint(folder / "checkpoints")
    if resume and known is None and last:
        raise ValueError(
            f"'{folder}' has checkpoints but no run.json, which says what they belong to: choose another `output_dir`."
        )
    if not resume and known and not known["finished"] and (last or (_work(folder) / "texts.json").exists()):
        raise ValueError(
            f"'{folder}' holds a run that was stopped: pass `resume_from_checkpoint=True` (`--resume`) to go on with "
            "it, or another `output_dir` (or delete this one)."
        )


def _known(folder: Path) -> dict[str, Any] | None:
    """What a folder's run was begun with and whether it is finished, if it has one."""
    file = folder / "run.json"
    known = read_json_if_there(file)
    if known is None:
        return None
    if not isinstance(known, dict) or not isinstance(known.get("begun_with"), dict) or "finished" not in known:
        raise ValueError(
            f"'{file}' is not what a translation writes there: choose another `output_dir`, or delete the file."
        )
    return known


def check_cache(run: Run) -> None:
    """
    Raises:
        ValueError: If `cache_dir` is the folder of a model or an adapter, which keeps what it holds.
        OSError: If it cannot be written.
    """
    if run.cache_dir is None or run.cache_dir == run.output_dir:
        return
    folder = Path(run.cache_dir)
    if any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"`cache_dir`, '{folder}', holds a model or an adapter: pass a folder of its own.")
    check_writable(folder)


def open_run(run: Run, describe: Callable[[], Mapping[str, Any]]) -> RunFolder:
    """Begin a run in a folder, or go on with the one there.

    Args:
        run (`Run`): The folder, where closed form and predictions are kept instead, and whether to go on.
        describe: Gives what decides the result, see `described`.

    Raises:
        ValueError: If the run to go on with was begun with something else.
        OSError: If the folder cannot be written.
    """
    if run.output_dir is None:
        return RunFolder(cache=None if run.cache_dir is None else Path(run.cache_dir))
    folder, begun_with = Path(run.output_dir), describe()
    return distributed.on_main_process(lambda: _open(folder, run.cache_dir, run.resume_from_checkpoint, begun_with))


def _open(folder: Path, cache_dir: str | Path | None, resume: bool, begun_with: Mapping[str, Any]) -> RunFolder:
    file = folder / "run.json"
    known = _known(folder) if resume else None
    if known is not None:
        _compare(folder, known, begun_with)
    try:
        remove_partial(folder)
        if known is None:
            # First, so that nothing of a run before is ever taken for this one's.
            clear_run(folder)
            write_json({"begun_with": begun_with, "finished": False}, file)
    except OSError as error:
        raise OSError(f"`output_dir`, {unwritten(folder, error)}") from error
    checkpoint = last_checkpoint(folder / "checkpoints") if known else None
    return RunFolder(folder, Path(cache_dir) if cache_dir else _work(folder), checkpoint, begun=known is None)


def check_resumed(options: Options, **given: Any) -> None:
    """Refuse, before anything is loaded, to go on with a run by other arguments than it was begun with.

    Args:
        options (`Options`): With the run's folder.
        given: What else decides the result and is no model, as for `described`.

    Raises:
        ValueError: Naming the arguments that differ.
    """
    run = options.run
    if run.output_dir is None or not run.resume_from_checkpoint:
        return
    if (known := _known(Path(run.output_dir))) is not None:
        _compare(Path(run.output_dir), known, _arguments(options, **given))


def _compare(folder: Path, known: Mapping[str, Any], begun_with: Mapping[str, Any]) -> None:
    names = [name for name in begun_with if known["begun_with"].get(name) != begun_with[name]]
    if names:
        changes = "; ".join(_change(name, known["begun_with"].get(name), begun_with[name]) for name in names)
        raise ValueError(
            f"The run in '{folder}' was begun with something else ({changes}): resume it with the same, or choose "
            "another `output_dir`."
        )


def clear_run(folder: Path) -> None:
    """Remove what a run left in a folder for going on with it; a finished adapter stays."""
    for old in (_work(folder), *checkpoints(folder / "checkpoints")):
        shutil.rmtree(old, ignore_errors=True)
    (folder / "run.json").unlink(missing_ok=True)


def described(options: Options, pair: Pair, *, text: Any, bridge: Any = None, **others: Any) -> dict[str, Any]:
    """What decides the result of a translation, JSON-ready; texts, models and bridges by a hash.

    Args:
        options (`Options`): Of which those count that decide.
        pair (`Pair`): The models.
        text: What is imitated on.
        bridge: Maps that were fitted before, a `Bridge` or a `StackedPart`, if there are any.
        others: Further arguments by name.
    """
    fits = [fit for fits in bridge.maps.kernels.values() for fit in fits] if bridge is not None else ()
    ids = pair.vocabulary
    kernels = [(name, k.scaling, _head(k.A), _head(k.B)) for name, k in pair.kernels.items()]
    return {
        **_arguments(options, text=text, **others),
        "bridge": _hash([_head(one) for fit in fits for side in fit.maps for one in side.factors]) if fits else None,
        "the source model or its adapter": _hash([fingerprint(pair.adapted), kernels, pair.given.identity]),
        "the target model": fingerprint(pair.target)[:16],
        "the tokenizers": _hash([ids.source_ids.tolist(), ids.target_ids.tolist()]),
    }


def _arguments(options: Options, *, text: Any, **others: Any) -> dict[str, Any]:
    """What decides the result of a translation and is no model."""
    found = {**options.deciding(), "text": text, **others}
    for name in ("text", "fit_text"):
        found[name] = None if found[name] is None else _hash(_plain(found[name]))
    found["training_args"] = {
        name: value
        for name, value in (found["training_args"] or {}).items()
        if not name.startswith(FREE_TRAINING_ARGS)
    }
    return json.loads(without_secrets(json.dumps(found, default=str)))


def _change(name: str, before: Any, now: Any) -> str:
    if name.startswith("the "):
        return name
    if name in ("text", "fit_text", "bridge"):
        return f"`{name}`"
    return f"`{name}` was {before!r} and is {now!r}"


def _hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _head(tensor: torch.Tensor) -> list[float]:
    return tensor.detach().flatten()[:64].tolist()


def _plain(value: Any) -> Any:
    """A text as something whose `repr` tells it apart; streams that cannot be read twice by their type alone."""
    if isinstance(value, datasets.Dataset):
        return value._fingerprint
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return type(value).__name__, [(field.name, _plain(getattr(value, field.name))) for field in fields]
    if isinstance(value, Mapping):
        return [(str(name), _plain(part)) for name, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, (str, Path, int, float, type(None))) else type(value).__name__


def _work(folder: Path) -> Path:
    return folder / "work"


def _texts(kept: dict[str, Any]) -> PairTexts:
    metrics, answers = kept.pop("metrics"), [TextSample(**answer) for answer in kept.pop("answers", [])]
    pairs = {
        name: [AlignedPair(**{field: tuple(ids) for field, ids in pair.items()}) for pair in part]
        for name, part in kept.items()
    }
    return PairTexts(**pairs, metrics=metrics, answers=answers)


def _write_as_is(value: Any, file: Path) -> None:
    """Not `write_json`, which leaves out what looks like a token: text must come back as it was."""
    with replacing(file) as partial_file:
        partial_file.write_text(json.dumps(value), encoding="utf-8")
