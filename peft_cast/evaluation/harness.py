"""Standard tasks through lm-evaluation-harness (optional: `pip install 'peft-cast[eval]'`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import contiguous_head
from ..utils.fields import check_count
from .tasks import Scores


_MISSING = "Tasks of lm-evaluation-harness need it: pip install 'peft-cast[eval]'."


# Options with which the harness has other tasks than its own, or other settings for them.
_OTHER_TASKS = {"task_manager", "metadata"}


@cache
def _index() -> Any:
    """What the harness has, which it takes up to a minute to find out."""
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata={})


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-evaluation-harness, run through its own Hugging Face model class.

    Args:
        task (`str` or `dict`): Name of a task of the harness, e.g. `"arc_easy"`, `"hellaswag"`, `"gsm8k"`, or the
            configuration of a task of your own, as the harness documents it.
        metric (`str`): The metric that recovered lift is taken of, as the harness names it, e.g. `"acc_norm"` or
            `"exact_match"`. With several filters, add one: `"exact_match,strict-match"`.
        num_fewshot (`int`, *optional*): Examples in the prompt; the task's own number when not given.
        limit (`int`, *optional*): The first rows alone.
        batch_size (`int`): Rows per pass.
        higher_is_better (`bool`): The direction of the metric; `False` for perplexities.
        options (`dict`): Further arguments of `lm_eval.simple_evaluate`.
    """

    task: str | Mapping[str, Any]
    metric: str = "acc"
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 16
    higher_is_better: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.task if isinstance(self.task, str) else self.task["task"]

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("A `HarnessTask` needs the name of a task, such as 'arc_easy'.")
        check_count("limit", self.limit, 1)
        check_count("num_fewshot", self.num_fewshot, 0)

    def check(self) -> None:
        """Refuse, before a model is loaded, to run without the harness, or what is none of its tasks.

        Raises:
            ImportError: If lm-evaluation-harness is not installed.
            ValueError: If the harness has no such task, where its own tasks are asked for.
        """
        if find_spec("lm_eval") is None:
            raise ImportError(_MISSING)
        named = isinstance(self.task, str) and not Path(self.task).exists()  # it takes the file of one too
        if named and not _OTHER_TASKS & set(self.options) and self.task not in _index().all_tasks:
            raise ValueError(self._unknown)

    @property
    def _unknown(self) -> str:
        return f"lm-evaluation-harness has no task '{self.name}': `lm-eval ls tasks` lists those it has."

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scores:
        """The harness' metrics, filters stripped where a metric has just one.

        Raises:
            ImportError: If lm-evaluation-harness is not installed.
            ValueError: If the task has no such metric.
        """
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise ImportError(_MISSING) from error
        with contiguous_head(model):
            lm = HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size, device=str(model.device), dtype=None
            )
            task = self.task if isinstance(self.task, str) else dict(self.task)
            rows = {"num_fewshot": self.num_fewshot, "limit": self.limit}
            quiet = {"bootstrap_iters": 0, "log_samples": False}
            if not _OTHER_TASKS & set(self.options):
                quiet["task_manager"] = _index()
            try:
                found = lm_eval.simple_evaluate(lm, tasks=[task], **rows, **quiet, **self.options)
            except KeyError as error:
                if "is not a registered" not in str(error):
                    raise
                raise ValueError(self._unknown) from error
        results = {k: float(v) for k, v in found["results"][self.name].items() if isinstance(v, (int, float))}
        short = Counter(key.split(",")[0] for key in results)
        metrics = {key.split(",")[0] if short[key.split(",")[0]] == 1 else key: v for key, v in results.items()}
        if self.metric not in metrics:
            raise ValueError(f"The task '{self.name}' has no metric '{self.metric}'; it has {sorted(metrics)}.")
        return Scores(metrics)
