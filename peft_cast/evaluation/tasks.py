"""Small built-in tasks on local files: likelihood of answers, classification, generation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import answer_nats, by_length, choice_nats, continuations
from ..tuner.checks import shown
from ..utils import as_path
from ..utils.fields import check_count


Record: TypeAlias = Mapping[str, Any]
Records: TypeAlias = Sequence[Record]
Template: TypeAlias = str | Callable[[Record], str]
SHOWN = 8  # samples that are kept to be looked at


@dataclass(frozen=True)
class Scores:
    """How one model did on one task.

    Args:
        metrics (`dict[str, float]`): All metrics of the task.
        samples (`tuple[dict[str, str], ...]`): What the model wrote for the first rows, if it wrote anything.
        each (`tuple[float, ...]`): The task's metric on every item, 1 and 0 for right and wrong. With it an adapter is
            compared with the untouched target item by item.
    """

    metrics: Mapping[str, float]
    samples: tuple[Mapping[str, str], ...] = ()
    each: tuple[float, ...] = ()


class Task(Protocol):
    """What `evaluate` runs: a name, the metric that recovered lift is taken of, its direction, a function of a model.

    A dataclass is also recognized when an evaluation is taken up again; other tasks are run again. A task may have a
    method `check`, without arguments, which is called before the model is loaded and raises what `run` would, and for
    models with learned positions `check_positions`, of the tokenizer and how many they are.
    """

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scores:
        """The scores of one model, `metric` among its metrics."""
        ...


@dataclass(frozen=True)
class _OnRecords:
    """What the tasks below share: records from a sequence or a file, and a prompt that is made of each."""

    name: str
    data: Records | str | Path
    prompt: Template
    start: int = field(default=0, kw_only=True)
    limit: int | None = field(default=None, kw_only=True)
    batch_size: int = field(default=16, kw_only=True)
    base_prompts: Mapping[str, Template] = field(default_factory=dict, kw_only=True)

    def check(self) -> None:
        """Refuse, before a model is loaded, what the data tells: rows that cannot be read or lack what is asked for.

        Raises:
            ValueError, OSError: As `run`.
        """
        for name, least in (("start", 0), ("limit", 1), ("batch_size", 1)):
            check_count(name, getattr(self, name), least)
        if not isinstance(self.base_prompts, Mapping):
            raise ValueError(f"`base_prompts` must map names to prompts, got {shown(self.base_prompts)}.")
        rows = _rows(self)
        for template in (self.prompt, *self.base_prompts.values()):
            if not callable(template):  # functions are called once, by `run`
                self._filled(template, rows)
        self._check_rows(rows)

    def check_positions(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        """Refuse, before a model with learned positions is loaded, rows that are longer than those.

        Raises:
            ValueError: Naming the first.
        """
        rows = _rows(self)
        after = self._after(rows, tokenizer)
        for template in (self.prompt, *self.base_prompts.values()):
            for row, (prompt, more) in enumerate(zip(self._filled(template, rows), after), self.start):
                if (tokens := len(tokenizer(prompt).input_ids) + more) > positions:
                    raise ValueError(
                        f"Row {row} of the task '{self.name}' takes {tokens} tokens with its answer, and the target "
                        f"model has {positions} positions: shorten the prompt or the answer, or leave the row out."
                    )

    def _after(self, rows: Records, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """How many tokens the model reads after the prompt of each row."""
        raise NotImplementedError

    def _check_rows(self, rows: Records) -> None:
        """Refuse what the columns of one kind of task alone tell."""

    def _filled(self, template: Template, rows: Records) -> list[str]:
        """A template with each of the rows in it."""
        return [_fill(template, row, f"Row {i} of the task '{self.name}'") for i, row in enumerate(rows, self.start)]

    def for_base(self) -> dict[str, _OnRecords]:
        """The same task with each of the prompts that the untouched target alone is asked with, by their names."""
        return {name: replace(self, prompt=prompt, base_prompts={}) for name, prompt in self.base_prompts.items()}


@dataclass(frozen=True)
class AnswerLikelihood(_OnRecords):
    """How likely the model finds the gold answers: −log p(answer | prompt) in nats per character, lower is better.

    Nats per character, not per token, so that models with different tokenizers compare.

    Args:
        name (`str`): Name of the task in tables.
        data: Records (mappings), or the path of a jsonl file.
        prompt: Format string over a record's columns, e.g. `"Question: {question}\\nAnswer:"`, or a function of it.
        answer: Likewise, e.g. `" {answer}"`.
        start, limit (`int`): The records from `start` on, at most `limit` of them. By name alone, as what follows.
        batch_size (`int`): Records per pass.
        base_prompts (`dict`): Further prompts for the untouched target alone, by name, each like `prompt`: with solved
            examples, in its chat template, or whatever else it does its best with. They become the rows `base, NAME`.
    """

    answer: Template
    metric: ClassVar[str] = "nats_per_character"
    higher_is_better: ClassVar[bool] = False

    def _check_rows(self, rows: Records) -> None:
        if not callable(self.answer):
            self._answers(rows)

    def _after(self, rows: Records, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return [len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in self._answers(rows)]

    def _answers(self, rows: Records) -> list[str]:
        answers = self._filled(self.answer, rows)
        if "" in answers:
            raise ValueError(
                f"Row {self.start + answers.index('')} of the task '{self.name}' has an empty answer, of which there "
                "is no likelihood: leave the row out, or pass another `answer`."
            )
        return answers

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scores:
        rows = _rows(self)
        items = list(zip(self._filled(self.prompt, rows), self._answers(rows)))
        nats = answer_nats(model, tokenizer, items, self.batch_size)
        n, characters = len(items), torch.tensor([len(answer) for _, answer in items], dtype=torch.float64)
        score = float(nats.sum() / characters.sum())
        # Standard error of a ratio of sums (delta method)
        spread = (nats - score * characters).std(correction=min(1, n - 1)) * n**0.5 / characters.sum()
        return Scores(
            {self.metric: score, "stderr": float(spread), "items": n}, each=tuple((nats / characters).tolist())
        )


@dataclass(frozen=True)
class Classification(_OnRecords):
    """Share of records whose label the model finds the most likely continuation of the prompt.

    Args:
        name, data, prompt, start, limit, batch_size, base_prompts: As in `AnswerLikelihood`.
        labels (`tuple[str, ...]`): All labels.
        label (`str`): The column that holds the right one.
        continuation (`str`): How a label follows the prompt.
    """

    labels: tuple[str, ...]
    label: str = "label"
    continuation: str = " {label}"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def _check_rows(self, rows: Records) -> None:
        self._choices(rows)

    def _after(self, rows: Records, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        choices = tokenizer(self._choices(rows)[0], add_special_tokens=False).input_ids
        return [max(map(len, choices)) - 1] * len(rows)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scores:
        rows = _rows(self)
        choices, right = self._choices(rows)
        gold = torch.tensor(right)
        nats = choice_nats(model, tokenizer, self._filled(self.prompt, rows), choices, self.batch_size)
        hits = (nats.argmin(1) == gold).double()
        accuracy = float(hits.mean())
        metrics = {self.metric: accuracy, "stderr": _stderr(accuracy, len(rows))}
        metrics |= {"nats_per_label": float(nats.gather(1, gold[:, None]).mean()), "items": len(rows)}
        return Scores(metrics, each=tuple(hits.tolist()))

    def _choices(self, rows: Records) -> tuple[list[str], list[int]]:
        """How each label follows a prompt, and the number of each row's right one."""
        if (row := next((row for row in rows if self.label not in row), None)) is not None:
            raise ValueError(
                f"The task '{self.name}' takes its labels from '{self.label}', but the data has the columns "
                f"{sorted(map(str, row))}: pass the column as `label`."
            )
        own = [row[self.label] for row in rows]
        if unknown := {str(label) for label in own if label not in self.labels}:
            raise ValueError(f"The task '{self.name}' has rows with the labels {sorted(unknown)}, not in `labels`.")
        choices = [_fill(self.continuation, {"label": label}, "`labels`") for label in self.labels]
        return choices, list(map(self.labels.index, own))


@dataclass(frozen=True)
class Generation(_OnRecords):
    """Greedy answers: share that matches the gold answer, and share in the wanted format.

    Args:
        name, data, prompt, start, limit, batch_size, base_prompts: As in `AnswerLikelihood`.
        answer: Format string or function that gives the gold text, to which `pattern` is applied as well.
        pattern (`str`): Regular expression; its first group is what must match. An answer without it is out of format.
        max_new_tokens (`int`): The most tokens per answer.
        fallback (`str`, *optional*): Regular expression with a group, whose last match counts in an answer out of
            format: the last number of an answer at length is fair to a model that was never taught the format.
        until (`str`, *optional*): What ends an answer; it and what follows are not looked at. A model that never
            learned to stop goes on with a question of its own.
        metric (`str`): What recovered lift is taken of: `"exact_match"`, or `"in_format"` for models that are too
            small to be right.
    """

    answer: Template
    pattern: str
    max_new_tokens: int = 160
    fallback: str | None = field(default=None, kw_only=True)
    until: str | None = field(default=None, kw_only=True)
    batch_size: int = field(default=64, kw_only=True)
    metric: str = "exact_match"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self):
        for name, pattern in (("pattern", self.pattern), ("fallback", self.fallback)):
            try:
                groups = 1 if pattern is None else re.compile(pattern).groups
            except (re.error, TypeError) as error:
                raise ValueError(f"`{name}` is no regular expression ({error}), got {pattern!r}.") from None
            if groups < 1:
                raise ValueError(f"`{name}` needs a group in brackets, which is what must match, got {pattern!r}.")
        if self.metric not in ("exact_match", "in_format"):
            raise ValueError(f"`metric` must be 'exact_match' or 'in_format', got {self.metric!r}.")

    def _check_rows(self, rows: Records) -> None:
        if not callable(self.answer):
            self._filled(self.answer, rows)

    def _after(self, rows: Records, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return [self.max_new_tokens - 1] * len(rows)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scores:
        rows = _rows(self)
        prompts, gold = self._filled(self.prompt, rows), self._filled(self.answer, rows)
        written = generate(model, tokenizer, prompts, self.max_new_tokens, self.batch_size)
        wanted, found = ([self._extract(text) for text in texts] for texts in (gold, written))
        fair = [one if one is not None else self._last(text) for one, text in zip(found, written)]
        each = {
            "exact_match": [float(w is not None and w == f) for w, f in zip(wanted, fair)],
            "in_format": [float(one is not None) for one in found],
        }
        metrics = {name: sum(values) / len(rows) for name, values in each.items()} | {"items": len(rows)}
        metrics["stderr"] = _stderr(metrics[self.metric], len(rows))
        shown = zip(prompts[:SHOWN], gold, written)
        samples = tuple({"prompt": p, "gold": g, "written": w} for p, g, w in shown)
        return Scores(metrics, samples, tuple(each[self.metric]))

    def _extract(self, text: str) -> str | None:
        """What an answer in the format says."""
        match = re.search(self.pattern, self._cut(text))
        return _plain(match[1]) if match and match[1] is not None else None

    def _last(self, text: str) -> str | None:
        """What an answer out of the format says, by the fallback."""
        found = [match[1] for match in re.finditer(self.fallback, self._cut(text))] if self.fallback else []
        return _plain(found[-1]) if found else None

    def _cut(self, text: str) -> str:
        return text.partition(self.until)[0] if self.until else text


def _plain(number: str) -> str:
    """Without what separates thousands, and without cents that are none."""
    return re.sub(r"\.0*$", "", number.replace(",", "").strip())


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """Greedy `continuations` of the prompts, in batches of like length."""
    written = [""] * len(prompts)
    for chunk in by_length(prompts, batch_size):
        for i, text in zip(chunk, continuations(model, tokenizer, [prompts[i] for i in chunk], max_new_tokens)):
            written[i] = text
    return written


def _stderr(share: float, count: int) -> float:
    return (share * (1 - share) / count) ** 0.5


def _rows(task: _OnRecords) -> Records:
    """The records of a task.

    Raises:
        ValueError: If there are none, or a line of the file is no JSON, or no record.
        OSError: If the file cannot be read.
    """
    data, named = as_path(task.data), f"The data of the task '{task.name}'"
    if isinstance(data, (str, Path)):
        named += f", '{data}',"
        try:
            # Not splitlines: JSON strings may hold the line separators of Unicode.
            lines = Path(data).read_text(encoding="utf-8").split("\n")
            data = [json.loads(line) for line in lines if line.strip()]
        except FileNotFoundError as error:
            raise OSError(f"{named} does not exist.") from error
        except OSError as error:
            raise OSError(f"{named} cannot be opened ({error.strerror}): pass a jsonl file.") from error
        except ValueError as error:  # of the encoding too
            raise ValueError(f"{named} is no jsonl file: {error}") from error
    elif not isinstance(data, Iterable) or isinstance(data, Iterator):  # it is read more than once
        raise ValueError(f"{named} must be a jsonl file or a list of records, got {type(data).__name__}.")
    rows = list(data)[task.start :][: task.limit]
    if not rows:
        raise ValueError(
            f"The task '{task.name}' has no rows from {task.start} on: pass other data or a lower `start`."
        )
    for row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{named} must hold records, from columns to values, got {shown(row)}.")
    return rows


def _fill(template: Template, row: Record, where: str) -> str:
    """
    Raises:
        ValueError: If the row, which messages call `where`, lacks a column or has nothing in it, or if the template is
            none.
    """
    if callable(template):
        return template(row)
    if not isinstance(template, str):
        raise ValueError(
            f"The template {shown(template)} is neither a string with columns in braces nor a function of a record: "
            "pass one of them."
        )
    try:
        text = template.format_map(row)
        names = [name for _, name, _, _ in Formatter().parse(template) if name]
        lacking = [name for name in names if Formatter().get_field(name, (), row)[0] is None]
    except KeyError as error:
        raise ValueError(
            f"The template {template!r} names {error}, but the data has the columns {sorted(map(str, row))}."
        ) from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"The template {template!r} cannot be filled in ({error}): name columns in braces, and write every other "
            "brace twice."
        ) from error
    if lacking:  # it would be read as the word None
        raise ValueError(f"{where} has no '{lacking[0]}': give it one, or leave it out.")
    return text
