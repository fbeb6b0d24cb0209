"""Corpora: C4 by default, any hub dataset, local files, or text already in memory."""

from __future__ import annotations

import codecs
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from ..tuner.checks import number_of, why_pointer
from ..utils import as_path, distributed, looks_like_path, one_line, secrets_removed, without_secrets


_SPLIT = (datasets.DatasetDict, datasets.IterableDatasetDict)
# By a file's suffix the builder of `datasets` that reads it, and what the file must be.
_BUILDERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet", ".csv": "csv"}
# What the command line and config files write for a text, by what to pass in Python.
_WORDS = {"c4": "'allenai/c4'", "C4": "'allenai/c4'", "self": "`SelfWritten()`", "survey": "`Survey()`"}
_FORMS = {
    "json": 'with an object like {"text": "..."} per line',
    "text": "with a blank line between texts",
    "parquet": "a whole parquet file",
    "csv": "with the names of its columns in the first line",
}


@dataclass(frozen=True)
class Corpus:
    """A corpus with its options; a plain string, path, list or dataset means `Corpus` of it.

    Args:
        source: Hub dataset id, path of a local jsonl/json/txt/parquet/csv file, iterable of strings, or a
            `datasets.Dataset` or `IterableDataset`. A txt file has one text per paragraph (blank lines between).
        column (`str`): The column that holds the text.
        name (`str`, *optional*): Configuration of a hub dataset, e.g. `"en"`; of others there is none.
        split (`str`): Split of a hub dataset, likewise.
        min_chars (`int`): Shorter texts are left out.
    """

    source: Any = "allenai/c4"
    column: str = "text"
    name: str | None = None
    split: str = "train"
    min_chars: int = 50

    def __str__(self) -> str:
        is_named = isinstance(self.source, (str, Path))
        return f"'{without_secrets(self.source)}'" if is_named else f"({type(self.source).__name__})"


C4 = Corpus("allenai/c4", name="en", min_chars=200)
# The first documents of examples/data/c4_en_400.jsonl (ODC-BY 1.0, subject to Common Crawl's terms of use).
PACKAGED = Corpus(Path(__file__).with_name("general.jsonl"), min_chars=200)


def read_corpus(corpus: Any, limit: int, argument: str = "text") -> list[str]:
    """The first `limit` texts of a corpus that are long enough; of several processes one reads, and all have them.

    Args:
        corpus: A `Corpus` or anything that its `source` may be; `None` is C4 (`allenai/c4`, en), streamed, or where
            that is out of reach the few documents of it that come with the package, which is said in a warning.
        limit (`int`): The most texts to read. Streams are read no further.
        argument (`str`): As what it is passed, for messages.

    Raises:
        ValueError: If it holds no text that is long enough, or lacks the column.
        OSError: If it cannot be reached; the message says what to pass instead.
    """
    return distributed.on_main_process(partial(_read, corpus, limit, argument))


def first_rows(source: str, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a dataset, whatever their columns: of its training split, or else of its first.

    Args:
        source: Hub id, or path of a file or folder as in `Corpus`. On the hub its default configuration is read, or
            else its first.
        count (`int`): The most rows to read. Streams are read no further.

    Raises:
        Exception: If it cannot be reached or read; those of `datasets` are of many kinds.
    """
    if not _on_hub(source, "datasets"):
        rows = _local(source)
    elif hasattr(datasets.packaged_modules, source):  # `json`, a reader of whatever lies in the working folder
        raise ValueError(f"'{source}' is no dataset on the hub.")
    else:
        with secrets_removed():
            name = datasets.get_dataset_default_config_name(source) or datasets.get_dataset_config_names(source)[0]
            rows = datasets.load_dataset(source, name, streaming=True)
    if isinstance(rows, _SPLIT):
        rows = rows["train"] if "train" in rows else next(iter(rows.values()))
    return list(islice(rows, count))


def _as_corpus(corpus: Any) -> Corpus:
    if not isinstance(corpus, Corpus):
        corpus = C4 if corpus is None or corpus == C4.source else Corpus(corpus)
    return replace(corpus, source=as_path(corpus.source)) if isinstance(corpus.source, (str, Path)) else corpus


def _read(corpus: Any, limit: int, argument: str) -> list[str]:
    if corpus is None:
        try:
            return _read(C4, limit, argument)
        except OSError:
            found = _read(PACKAGED, limit, argument)
            warnings.warn(
                f"C4 could not be reached on the hub: the {len(found)} of its documents that come with peft_cast are "
                f"read as `{argument}` instead. Pass `{argument}` for more general text, or other."
            )
            return found
    corpus = _as_corpus(corpus)
    long_enough = (text for text in _texts(corpus, argument) if len(text.strip()) >= corpus.min_chars)
    try:
        texts = list(islice(long_enough, limit))
    except UnicodeDecodeError:  # of a row: the files are taken apart as bytes
        raise ValueError(f"The text corpus {corpus} is no UTF-8: save it as UTF-8.") from None
    if not texts:
        raise ValueError(
            f"The text corpus {corpus} holds no text of at least {corpus.min_chars} characters: pass more or longer "
            "text, or `Corpus(..., min_chars=...)`."
        )
    return texts


def _texts(corpus: Corpus, argument: str) -> Iterator[str]:
    """All texts, empty where a column has none."""
    source, column = corpus.source, corpus.column
    if _on_hub(source, argument):
        source = _hub(corpus, argument)
    elif given := [name for name in ("name", "split") if getattr(corpus, name) != getattr(Corpus, name)]:
        raise ValueError(
            f"`{given[0]}` is for datasets on the Hub, and the text corpus {corpus} is none: leave it out."
        )
    elif isinstance(source, (str, Path)):
        source = _local(source)
    if isinstance(source, _SPLIT):
        raise ValueError(f"The text is a dataset with splits {sorted(source)}: pass one of them, e.g. text['train'].")
    if not isinstance(source, Iterable) or isinstance(source, (Mapping, bytes)):
        raise ValueError(
            f"`{argument}` must be a hub id, a path, an iterable of strings or a dataset, got {type(source).__name__}."
        )
    if not isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        yield from (_checked(text, f"`{argument}`") for text in source)
        return
    for row in source:
        if column not in row:
            raise ValueError(
                f"The text corpus {corpus} has no column '{column}'; it has {', '.join(sorted(map(str, row))[:12])}: "
                "pass Corpus(..., column=...), in a config file {corpus: {source: ..., column: ...}}."
            )
        text = row[column]
        yield "" if text is None else _checked(text, f"The column '{column}' of the text corpus {corpus}")


def _checked(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{what} must hold strings, got {type(text).__name__}.")
    return text


def check_corpus(corpus: Any, least: int = 1, argument: str = "text") -> None:
    """Refuse what can be refused before models are loaded: what lies on disk or in memory and cannot be used. What
    may be read but once, as an iterator, is left alone.

    Args:
        corpus: Anything that `read_corpus` takes.
        least (`int`): How many texts it must hold.
        argument (`str`): As what it is passed, for messages.

    Raises:
        ValueError, OSError: As `read_corpus`, and if it holds fewer texts.
    """
    corpus = _as_corpus(corpus)
    source, wanted = corpus.source, least
    if _on_hub(source, argument):
        return
    if isinstance(source, (list, tuple)):
        wanted = len(source)
    elif isinstance(source, Iterable) and not isinstance(source, (str, bytes, Path, Mapping, datasets.Dataset)):
        return
    if (found := len(_read(corpus, wanted, argument))) < least:
        raise ValueError(
            f"The text corpus {corpus} gives {number_of(found, 'usable sample')}, at least {least} are needed: pass "
            "more or longer text."
        )


def check_reached(corpus: Any, argument: str) -> None:
    """Refuse a corpus on the Hub that is asked for and not at hand where the Hub is switched off (HF_HUB_OFFLINE).

    Raises:
        OSError: As `read_corpus`.
    """
    if corpus is None:  # what comes with the package will do
        return
    corpus = _as_corpus(corpus)
    if datasets.config.HF_HUB_OFFLINE and _on_hub(corpus.source, argument):
        _hub(corpus, argument)


def _on_hub(source: Any, argument: str) -> bool:
    """Whether a source is the name of a dataset on the Hub.

    Raises:
        ValueError: If a string is neither a path nor such a name.
    """
    if not isinstance(source, (str, Path)) or os.path.exists(source):
        return False
    if source in _WORDS:
        general = argument != "text" and source in ("self", "survey")  # whose text is none that models write
        instead = "a file, a hub dataset id or a list of strings" if general else _WORDS[source]
        raise ValueError(f"`{argument}`, '{source}', is a word of the command line: pass {instead}.")
    if "://" in str(source):
        raise ValueError(
            f"`{argument}`, '{without_secrets(source)}', is a web address: pass the id of a dataset on the Hub "
            "(user/name), or download the file and pass that."
        )
    if isinstance(source, str) and len(source.split()) > 1:
        start = source.split("\n")[0][:40]
        raise ValueError(
            f"The text '{start}…' is one string, which is taken for a file or a dataset id: pass a list of strings."
        )
    return Path(source).suffix.lower() not in _BUILDERS and not looks_like_path(source)


def _builder(source: str | Path) -> tuple[str | None, dict[str, Any]]:
    """The builder of `datasets` that reads a file, with its options; no builder for a folder."""
    path, shown = Path(source), f"The text file '{without_secrets(source)}'"
    if not path.exists():
        raise OSError(f"{shown} does not exist.")
    if path.is_dir():
        return None, {}
    if (builder := _BUILDERS.get(path.suffix.lower())) is None:
        raise ValueError(f"{shown} has an unknown type; known are {', '.join(sorted(_BUILDERS))}.")
    try:
        with open(path, "rb") as file:
            start = file.read(2**20)
    except OSError as error:
        raise OSError(f"{shown} cannot be opened ({error.strerror}).") from error
    if not start.strip():
        raise ValueError(f"{shown} is empty: pass one with text.")
    if (why := why_pointer(start)) is not None:
        raise ValueError(f"{shown} {why}.")
    if builder == "parquet":
        return builder, {}
    if b"\0" in start:  # one in every letter, or every second
        raise ValueError(f"{shown} is no UTF-8, as it holds zero bytes: save it as UTF-8.")
    marked = {"encoding": "utf-8-sig"} if start.startswith(codecs.BOM_UTF8) else {}
    return builder, marked | ({"sample_by": "paragraph"} if builder == "text" else {})


def _local(source: str | Path) -> datasets.Dataset:
    path, shown, (builder, options) = str(source), without_secrets(source), _builder(source)
    if builder is None:
        try:
            return datasets.load_from_disk(path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The folder '{shown}' holds no dataset that `save_to_disk` wrote: pass a text file, or such a folder."
            ) from error
    must = "" if builder == "parquet" else "UTF-8, "
    try:
        return datasets.load_dataset(builder, data_files=path, split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"The text file '{shown}' holds no rows: pass one with text.") from error
        raise ValueError(
            f"The text file '{shown}' could not be read as {Path(source).suffix} "
            f"({one_line(error.__cause__ or error).rstrip('.')}): it must be {must}{_FORMS[builder]}."
        ) from error


def _hub(corpus: Corpus, argument: str) -> datasets.IterableDataset:
    try:
        with secrets_removed():
            return datasets.load_dataset(corpus.source, corpus.name, split=corpus.split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        why = "the offline mode is on" if datasets.config.HF_HUB_OFFLINE else type(error).__name__
        flag = f"--{argument.replace('_', '-')}"
        raise OSError(
            f"The dataset {corpus} could not be reached on the hub ({why}). Without a connection, "
            f"pass text that is at hand as `{argument}`: a .jsonl, .txt or .parquet file (`{flag} FILE` on the "
            "command line), a list of strings, or a datasets.Dataset."
        ) from error
