"""What a folder or hub repository holds: a CAST adapter, a bridge, or another PEFT adapter."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..align import split_name
from ..results import BRIDGE_CONFIG_NAME, BRIDGE_WEIGHTS_NAME, METRICS_NAME
from ..results.artifacts import not_carried
from ..source import list_not_carried, read_files, weights_file
from ..tuner import CastConfig
from ..tuner.checks import number_of
from ..utils import as_path, find_file, why_no_folder, without_secrets


def inspect(adapter: str | Path, revision: str | None = None) -> dict[str, Any]:
    """An account of an adapter or a bridge, JSON-ready; no model is loaded.

    Returns:
        `kind` (`"CAST adapter"`, `"bridge"` or the PEFT type), `base_model`; `file` with `bytes`, `tensors`,
        `parameters` and `dtypes`; for a CAST adapter also `source` (model, adapter, revisions), `projections`,
        `kernels` (by module name within a layer: how many, their ranks and where from) and `layers` (target layer →
        source layers), and `metrics` if they were saved beside it. `holdings` is what the adapter holds and what
        becomes of it where it is a source, `not_carried` what of its own source it lacks. Where a folder has its
        adapters in subfolders, `adapters` has their accounts.

    Raises:
        ValueError: If there is neither an adapter nor a bridge.
    """
    adapter = as_path(adapter)
    if (why := why_no_folder(adapter, CONFIG_NAME, revision)) is not None:
        raise ValueError(without_secrets(f"The adapter could not be read: {why}."))
    if _file(adapter, BRIDGE_CONFIG_NAME, revision) is not None:
        return _bridge(adapter, revision)
    inner = _subfolders(adapter)
    if inner and not Path(adapter, CONFIG_NAME).is_file():
        accounts = {name: _inspect_inner(Path(adapter, name)) for name in inner}
        if all("error" in account for account in accounts.values()):
            raise ValueError(next(iter(accounts.values()))["error"])
        base = next((account["base_model"] for account in accounts.values() if account["base_model"]), None)
        return {
            "kind": f"{number_of(len(inner), 'adapter')} in subfolders",
            "base_model": base,
            "file": {},
            "adapters": accounts,
        }
    config, holdings = read_files(adapter, revision)
    account: dict[str, Any] = {
        "kind": holdings.kind.partition(" ")[0],
        "base_model": holdings.base_model,
        "revision": holdings.revision,
        "task_type": holdings.task_type,
        "file": _weights(_file(adapter, SAFETENSORS_WEIGHTS_NAME, revision)),
        "weights_file": weights_file(adapter, revision),
        "holdings": holdings.as_dict(),
    }
    if inner:
        account["also"] = inner
    if isinstance(config, CastConfig):
        account |= {"kind": "CAST adapter", **_cast(config)}
    elif config is not None and hasattr(config, "r"):
        modules = config.target_modules
        account |= {"rank": config.r, "alpha": getattr(config, "lora_alpha", None)}
        account["modules"] = sorted(modules) if isinstance(modules, (set, list)) else modules
    metrics = _file(adapter, METRICS_NAME, revision)
    if metrics is not None:
        account["metrics"] = _metrics(metrics)
    known = account.get("metrics", {}).get("not_carried")
    account["not_carried"] = known or not_carried(getattr(config, "not_carried", None))
    return account


def _inspect_inner(adapter: Path) -> dict[str, Any]:
    """The account of one adapter of several; of one that cannot be read, why."""
    try:
        return inspect(adapter)
    except (ValueError, OSError) as error:
        return {"kind": "unreadable", "base_model": None, "file": {}, "error": str(error)}


def describe(account: Mapping[str, Any]) -> str:
    """The account as a few lines of text."""
    if "error" in account:
        return account["error"]
    file = account["file"]
    lines = [
        f"{account['kind']} for {account['base_model']}"
        + (f" at {account['revision']}" if account.get("revision") else "")
    ]
    if "source" in account:
        source = account["source"]
        lines.append(f"translated from {source['adapter'] or 'no adapter'} of {source['model']}")
    if file:
        types = ", ".join(file["dtypes"])
        lines.append(
            f"file         {file['bytes'] / 2**20:.1f} MiB, {number_of(file['tensors'], 'tensor')}, "
            f"{file['parameters']:,} numbers ({types})"
        )
    elif "weights_file" in account:
        lines.append(f"file         {account['weights_file'] or 'no weights'}, no {SAFETENSORS_WEIGHTS_NAME}")
    if account.get("task_type"):
        lines.append(f"task         {account['task_type']}")
    if "projections" in account:
        p = account["projections"]
        extras = (
            [f"inner size {p['size'] or 'the rank'}"]
            + ["bias"] * p["bias"]
            + [f"shared by {p['sharing']}"] * bool(p["sharing"])
        )
        lines.append(f"projections  {p['type']}, {', '.join(extras)}")
    if "rank" in account:
        lines.append(f"rank         {account['rank']}, alpha {account['alpha']}, on {account['modules']}")
    for row in account.get("kernels", ()):
        ranks = ", ".join(map(str, row["ranks"]))
        lines.append(f"  {row['target']:<24} ← {row['source']:<24} × {row['count']}, rank {ranks}")
    if account.get("layers"):
        lines.append("layers       " + ", ".join(f"{'+'.join(map(str, s))}→{t}" for t, s in account["layers"].items()))
    if "bridge" in account:
        lines.append(
            f"from {account['bridge']['source']}: {number_of(account['bridge']['maps'], 'map')}, fitted on "
            f"{number_of(account['bridge']['texts'], 'text')}"
        )
    lines += account.get("holdings", {}).get("lines", ())
    if account.get("not_carried"):
        lines.append(f"its source   not carried over from there: {list_not_carried(account['not_carried'])}")
    if "also" in account:
        lines.append(f"besides      more adapters in the subfolders {', '.join(account['also'])}: pass one of them")
    for name, inner in account.get("adapters", {}).items():
        lines += ["", f"{name}:", *(f"  {line}" for line in describe(inner).splitlines())]
    if kl := account.get("metrics", {}).get("kl"):
        lines.append(
            "KL from the teacher (nats per position): "
            + ", ".join(f"{name} {value:.3f}" for name, value in kl.items())
        )
    return "\n".join(lines)


def _cast(config: CastConfig) -> dict[str, Any]:
    rows: dict[tuple[str, str], list[int]] = {}
    layers: dict[int, set[int]] = {}
    for name, specs in (config.kernels or {}).items():
        target_layer, target_label = split_name(name) or (None, name)
        for spec in specs:
            source_layer, source_label = split_name(spec.source_place or "") or (None, spec.source_place or "")
            rows.setdefault((target_label, source_label), []).append(spec.r)
            if target_layer is not None and source_layer is not None:
                layers.setdefault(target_layer, set()).add(source_layer)
    return {
        "source": {
            "model": config.source_model_name_or_path,
            "revision": config.source_model_revision,
            "adapter": config.source_adapter_name_or_path,
            "adapter_revision": config.source_adapter_revision,
        },
        "projections": {
            "type": config.projection_type,
            "size": config.projection_size,
            "bias": config.projection_bias,
            "sharing": config.projection_sharing,
        },
        "kernels": [
            {"target": target, "source": source or "random", "count": len(ranks), "ranks": sorted(set(ranks))}
            for (target, source), ranks in rows.items()
        ],
        "layers": {target: sorted(sources) for target, sources in sorted(layers.items())},
    }


def _bridge(folder: str | Path, revision: str | None) -> dict[str, Any]:
    from ..fit import Bridge

    bridge = Bridge.from_pretrained(str(folder), revision=revision)
    found = Counter(sum((fits for fits in bridge.modules.kernels.values()), []))
    return {
        "kind": "bridge",
        "base_model": bridge.target.name,
        "revision": bridge.target.revision,
        "file": _weights(_file(folder, BRIDGE_WEIGHTS_NAME, revision)),
        "bridge": {"source": bridge.source.name, "maps": len(found), "texts": bridge.metrics.get("texts")},
    }


def _metrics(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        metrics, folded = saved.get("metrics", {}), saved.get("folded", {})
        names = ("kl", "excitement", "parameters", "phases", "settings")
        return {
            **{name: metrics[name] for name in names if name in metrics},
            "not_carried": [*metrics.get("source", {}).get("not_carried", ()), *folded.get("not_carried", ())],
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' could not be read: {error!r}. Delete it; the adapter does not need it.") from error


def _subfolders(adapter: str | Path) -> list[str]:
    """Adapters of other names, which PEFT saves to folders of their own."""
    return sorted(path.parent.name for path in Path(adapter).glob(f"*/{CONFIG_NAME}"))


def _file(folder: str | Path, name: str, revision: str | None) -> Path | None:
    try:
        return find_file(folder, name, revision)
    except (EntryNotFoundError, OSError, ValueError):
        return None


def _weights(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(key) for key in file.keys()]
            shapes = [s.get_shape() for s in slices]
            dtypes = sorted({s.get_dtype() for s in slices})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"'{path}' is no whole safetensors file ({error}): download it again.") from error
    numbers = sum(math.prod(shape) for shape in shapes)
    return {"bytes": path.stat().st_size, "tensors": len(shapes), "parameters": numbers, "dtypes": dtypes}
