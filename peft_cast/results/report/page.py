"""The report of a translation as files: `report.html`, complete in itself, and a short `report.md`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
from markupsafe import Markup, escape
from peft.utils import CONFIG_NAME

from ...utils import as_place, complete_folder, read_json_if_there
from ..artifacts import METRICS_NAME, REPORT_NAME, read_metrics
from ..rows import Evaluation
from .contents import LEVELS, Contents, contents, with_code
from .markdown import to_markdown


HERE = Path(__file__).parent
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["code"] = lambda text: Markup("").join(
    Markup("<code>{}</code>").format(part.strip("`")) if code else escape(part) for part, code in with_code(text)
)


class Reported(Protocol):
    """What a report is written of: a `TranslationResult`, which stands above this folder."""

    @property
    def metrics(self) -> dict[str, Any]: ...

    @property
    def history(self) -> Sequence[dict[str, float]]: ...


def write_report(
    result: Reported | str | Path, folder: str | Path | None = None, *, evaluation: Evaluation | None = None
) -> Path:
    """Write the report of a translation: `report.html`, one page that loads nothing else, and the short `report.md`.

    `TranslationResult.save_pretrained` does it; call it again with what `evaluate` measured to add that.

    Args:
        result: What `translate` returned, or a folder that it was saved to, with `cast_metrics.json`. Those of older
            versions lack parts, which the report then leaves out.
        folder: Where to write; by default the folder that was read.
        evaluation: Recovered lift and drift, see `evaluate`.

    Returns:
        `Path`: The page, `report.html`.

    Raises:
        ValueError: If there are no metrics in the folder, or no folder to write to is given.
        OSError: If it cannot be written.
    """
    history: Sequence[dict[str, float]]
    if isinstance(result, (str, Path)):
        metrics, history, models = _read(Path(result))
        folder = Path(result) if folder is None else as_place(folder)
    elif folder is None:
        raise ValueError("`write_report` needs the `folder` to write to when it is given a result.")
    else:
        metrics, history, models, folder = result.metrics, result.history, {}, as_place(folder)
    report = contents(metrics, history, evaluation, models)
    with complete_folder(folder) as partial:
        (partial / "report.md").write_text(to_markdown(report), encoding="utf-8")
        (partial / "report.html").write_text(to_html(report), encoding="utf-8")
    return folder / "report.html"


def to_html(report: Contents) -> str:
    """The page."""
    style = Markup((HERE / "page.css").read_text(encoding="utf-8"))  # ours, not to be escaped
    return TEMPLATES.get_template("page.html.jinja").render(report=report, style=style, levels=LEVELS)


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]], dict[str, str]]:
    """Metrics, history and the names of the models from a saved adapter's folder."""
    remedy = "pass the folder of an adapter that `translate` made and `save_pretrained` saved"
    if not (folder / METRICS_NAME).is_file():
        held = f"'{folder}' has no {METRICS_NAME}" if folder.is_dir() else f"there is no folder '{folder}'"
        raise ValueError(f"The metrics of a translation could not be read, {held}: {remedy}.")
    try:
        saved = read_metrics(folder)
        metrics, history = saved["metrics"], saved.get("history", [])
        if not isinstance(metrics, dict) or not isinstance(history, list):
            raise TypeError
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"'{folder / METRICS_NAME}' with a translation's metrics could not be read, it is broken or holds "
            f"something else: get it again, or {remedy}."
        ) from error
    beside = (read_json_if_there(folder / name) for name in (CONFIG_NAME, REPORT_NAME))
    config, gathered = (data if isinstance(data, dict) else {} for data in beside)
    if gathered:
        metrics["report"] = gathered
    keys = {
        "source": "source_model_name_or_path",
        "adapter": "source_adapter_name_or_path",
        "target": "base_model_name_or_path",
    }
    return metrics, history, {name: config[key] for name, key in keys.items() if config.get(key)}
