"""What the teacher says, kept: the same text is read in every epoch, and in every run of a series."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..align import AlignedPair
from ..tuner.checks import TensorInfo, read_header
from ..utils import distributed, optional, write_tensors
from .losses import Logits, Predictions, TopKDivergence, rows_at_once


@dataclass(frozen=True)
class TopKLogProbs:
    """Predictions at n positions, cut to the k likeliest tokens and the mass of all others.

    Args:
        tokens (`torch.Tensor`): Shape (n, k), int32.
        log_p (`torch.Tensor`): Their log-probabilities and, last, that of all the other tokens together, shape (n, k +
            1),
            float16: 6 bytes a token in all.
    """

    tokens: torch.Tensor
    log_p: torch.Tensor

    @classmethod
    def of(cls, logits: Logits, k: int, temperature: float = 1.0) -> TopKLogProbs:
        """The k likeliest of logits (n, vocabulary), at a temperature."""
        parts = []
        for rows in logits.split(rows_at_once(logits)):
            log_p, tokens = (rows.float() / temperature).log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
            rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(1e-6).log()
            parts.append(cls(tokens.to(torch.int32), torch.cat([log_p, rest], dim=-1).to(torch.float16)))
        return cls.cat(parts)

    @classmethod
    def cat(cls, parts: Sequence[TopKLogProbs]) -> TopKLogProbs:
        return cls(torch.cat([p.tokens for p in parts]), torch.cat([p.log_p for p in parts]))

    def split(self, sizes: Sequence[int]) -> list[TopKLogProbs]:
        # Clones: a slice would keep the whole batch alive.
        return [TopKLogProbs(t.clone(), p.clone()) for t, p in zip(self.tokens.split(sizes), self.log_p.split(sizes))]

    def to(self, device: torch.device) -> TopKLogProbs:
        return TopKLogProbs(self.tokens.to(device), self.log_p.to(device))

    def kl_divergence(self, student: Logits, temperature: float = 1.0) -> torch.Tensor:
        """`T² KL(these ‖ softmax(student / T))` in nats at each position, all other tokens taken as one.

        Never more than the KL over the whole vocabulary, and equal to it where the others are in the teacher's
        proportion.

        Args:
            student (`torch.Tensor` or `Predictions`): Logits (n, vocabulary).
            temperature (`float`): The temperature T at which the teacher was cut.

        Returns:
            `torch.Tensor`: Shape (n,).
        """
        whole = self.tokens.shape[-1] == student.shape[-1]  # no others: their mass is rounding
        log_p = self.log_p[:, :-1] if whole else self.log_p
        if isinstance(student, Predictions):
            return TopKDivergence.apply(student.states, self.tokens, log_p, temperature, student.head)
        return TopKDivergence.apply(student, self.tokens, log_p, temperature)


class TeacherCache:
    """Predictions by text, made at first sight and kept.

    Args:
        k (`int`): How many of the likeliest tokens are kept at each position.
        temperature (`float`): The temperature of the predictions.
        folder: Where they are kept between runs too; only in memory when `None`. What is made at once is one file: a
            batch's padding shows in the last digits, so that a run that takes them up again must find all of it or
            nothing.
        identity (`str`): What else decides the predictions (models, adapter, vocabulary); part of the files' names.
        limit (`int`): The most bytes kept in memory; what does not fit is made anew (or read from `folder`) each time.
        vocabulary (`int`): How many tokens there are; files that name others are not ours.
    """

    def __init__(
        self,
        k: int,
        temperature: float = 1.0,
        folder: str | Path | None = None,
        identity: str = "",
        limit: int = 2**31,
        vocabulary: int = 2**31,
    ) -> None:
        self.k, self.temperature, self.limit, self.vocabulary = k, temperature, limit, vocabulary
        self.prefix = f"predictions_{_digest(f'{identity} {k} {temperature}')}"
        self.folder = Path(folder) if folder is not None else None
        self.files = self._look(self.folder) if self.folder is not None else {}
        self.headers: dict[Path, dict[str, TensorInfo]] = {}
        self.kept: dict[tuple[str, AlignedPair], TopKLogProbs] = {}
        self.bytes = 0

    def get_or_make(
        self,
        role: str,
        pairs: Sequence[AlignedPair],
        counts: Sequence[int],
        make: Callable[[list[AlignedPair]], Logits],
        idle: AlignedPair | None = None,
    ) -> TopKLogProbs:
        """The predictions for some texts one after another, those not seen before made by `make`.

        Args:
            role (`str`): Who predicts; texts are kept apart by it.
            pairs: The texts.
            counts: Positions of each.
            make: Logits (positions, vocabulary) of some texts one after another.
            idle: For `make`, and then thrown away, where another process must make something and this one need not.
                `None` if each may make passes of its own.
        """
        sizes = dict(zip(pairs, counts))
        known = {pair: self._find(role, pair, count) for pair, count in sizes.items()}
        found = {pair: part for pair, part in known.items() if part is not None}
        absent = [pair for pair in sizes if pair not in found]
        if idle is not None and distributed.any_process(bool(absent)) and not absent:
            make([idle])
        if absent:
            made = TopKLogProbs.of(make(absent), self.k, self.temperature).to(torch.device("cpu"))
            parts = dict(zip(absent, made.split([sizes[pair] for pair in absent])))
            found.update(parts)
            for pair, part in parts.items():
                self._keep(role, pair, part)
            if self.folder is not None:
                self._write(self.folder, {_key(role, pair): part for pair, part in parts.items()})
        return TopKLogProbs.cat([found[pair] for pair in pairs])

    def _keep(self, role: str, pair: AlignedPair, part: TopKLogProbs) -> None:
        size = part.tokens.nbytes + part.log_p.nbytes
        if self.bytes + size <= self.limit:
            self.kept[role, pair] = part
            self.bytes += size

    def _find(self, role: str, pair: AlignedPair, count: int) -> TopKLogProbs | None:
        key = _key(role, pair) if self.files else None
        if (role, pair) in self.kept or key not in self.files:
            return self.kept.get((role, pair))
        try:
            if not self._fits(key, count):
                return None
            with safe_open(self.files[key], framework="pt") as saved:
                part = TopKLogProbs(saved.get_tensor(f"{key}.tokens"), saved.get_tensor(f"{key}.log_p"))
        except (OSError, SafetensorError, ValueError):  # gone or broken since: made anew
            return None
        least, most = part.tokens.min().item(), part.tokens.max().item()
        if not 0 <= least <= most < self.vocabulary or torch.isnan(part.log_p).any():
            return None
        self._keep(role, pair, part)
        return part

    def _fits(self, key: str, count: int) -> bool:
        """Whether a file in the folder, which is not always ours, holds predictions at `count` positions."""
        file = self.files[key]
        if file not in self.headers:
            self.headers[file] = read_header(file)
        tokens, log_p = (self.headers[file].get(f"{key}.{name}") for name in ("tokens", "log_p"))
        kept = tokens.shape[-1] if tokens and len(tokens.shape) == 2 else 0
        wanted = TensorInfo("I32", (count, kept)), TensorInfo("F16", (count, kept + 1))
        return 1 <= kept <= self.k and (tokens, log_p) == wanted

    def _look(self, folder: Path) -> dict[str, Path]:
        """The files of the folder by the texts in them."""
        files: dict[str, Path] = {}
        for file in sorted(folder.glob(f"{self.prefix}_*.safetensors")):
            with suppress(OSError, SafetensorError), safe_open(file, framework="pt") as saved:  # broken: made anew
                files |= {name.partition(".")[0]: file for name in saved.keys()}
        return files

    def _write(self, folder: Path, parts: Mapping[str, TopKLogProbs]) -> None:
        tensors = {f"{key}.{name}": getattr(part, name) for key, part in parts.items() for name in ("tokens", "log_p")}
        process = f"_{distributed.rank()}" if distributed.world_size() > 1 else ""  # no two write one file
        file = folder / f"{self.prefix}_{_digest(str(list(parts)))}{process}.safetensors"
        with optional("The teacher's predictions"):
            write_tensors(tensors, file)
            self.files |= dict.fromkeys(parts, file)
            return
        self.folder = None  # one warning is enough, and so is one attempt


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _key(role: str, pair: AlignedPair) -> str:
    return _digest(f"{role} {pair}")
