"""An adapter's file under the names that PEFT expects: in a folder of its own, which is gone afterwards."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file

from ..align import sees_or_hears
from ..tuner.checks import TensorInfo
from ..utils import check_weights, find_file
from .disagreement import left_open, made_anew, passed_over
from .kinds import PREFIX
from .names import Match, Part, halves


@dataclass(frozen=True)
class Readable:
    """An adapter as PEFT can load it.

    Args:
        place (`str`): Hub id or folder.
        revision (`str`, *optional*): Its hub revision.
        config ([`~peft.PeftConfig`]): Its configuration.
        header (`dict[str, TensorInfo]`): Of its file.
        renamed (`str`, *optional*): What was read as what, in a sentence.
    """

    place: str
    revision: str | None
    config: PeftConfig
    header: dict[str, TensorInfo]
    renamed: str | None = None


@contextmanager
def readable(adapter: str | Path, revision: str | None, match: Match) -> Iterator[Readable]:
    """Within the context the adapter can be loaded on the model of `match`; its own folder is left alone.

    Warns if its tensors had to be renamed, and of modules in its configuration that the model does not have.

    Raises:
        ValueError: If what its file holds cannot be used.
    """
    config, renaming = _following(match), match.renaming
    header = check_weights(adapter, config, revision, match.source)
    for said in filter(None, (passed_over(match), left_open(match), made_anew(match))):
        warnings.warn(said)
    if renaming is None:
        yield Readable(str(adapter), revision, config, header)
        return
    with TemporaryDirectory(prefix="peft_cast_") as folder:
        config.save_pretrained(folder)
        with safe_open(find_file(adapter, SAFETENSORS_WEIGHTS_NAME, revision), framework="pt") as file:
            tensors = {new: file.get_tensor(old) for old, new in renaming.names.items() if new is not None}
        save_file(tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        header = {new: header[old] for old, new in renaming.names.items() if new is not None}
        if renaming.said:
            warnings.warn(renaming.said)
        yield Readable(folder, None, config, header, renaming.said)


def _following(match: Match) -> PeftConfig:
    """The configuration with its patterns, which may speak of the old names, or of other towers' modules of the same
    names too, speaking of the modules that the file has tensors for.
    """
    config = copy.deepcopy(match.config)
    held = match.renaming.modules if match.renaming else {name: name for name in map(_own_name, match.tuned)}
    pairs = held.items()
    targets = getattr(config, "target_modules", None)
    if targets and targets != "all-linear" and not any(part.is_expert for part in match.parts):

        def meant(name: str) -> bool:
            return bool(check_target_module_exists(config, name))

        renamed = not all(meant(new) for _, new in pairs) and all(
            meant(new) or any(map(meant, _olds(old))) for old, new in pairs
        )
        reached = {halves(new.split("."))[0] for _, new in pairs}
        others = match.modules.keys() - set(held.values())
        beyond = [name for name in others if match.modules[name] and meant(name)]
        if renamed or (
            beyond
            and not getattr(config, "target_parameters", None)
            and all(sees_or_hears(name) and halves(name.split("."))[0] not in reached for name in beyond)
        ):
            config.target_modules = {new for _, new in pairs}
            for option in ("exclude_modules", "layers_to_transform", "layers_pattern"):
                if getattr(config, option, None) is not None:
                    setattr(config, option, None)
    for option in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, option, None)
        if not isinstance(pattern, dict):
            continue
        lost = {}
        for old, new in pairs:
            keys = (get_pattern_key(pattern, name) for name in _olds(old))
            before = next((pattern[key] for key in keys if key in pattern), None)
            if before is not None and pattern.get(get_pattern_key(pattern, new)) != before:
                lost[f"^{re.escape(new)}"] = before
        setattr(config, option, {**lost, **pattern})
    return config


def _own_name(part: Part) -> str:
    return ".".join(part.head + part.tail).removeprefix(PREFIX)


def _olds(name: str) -> list[str]:
    """What a module may have been called when the adapter was trained, from its name in the file."""
    return list(dict.fromkeys([name.removeprefix(PREFIX), name.rpartition(PREFIX)[2], name]))
