"""Text written by the adapted source model itself: the text on which an adapter shows what it does."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, TypeAlias

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import (
    SampleTopK,
    beginning_of,
    check_prompts_fit,
    continuations,
    learned_positions,
    render_chats,
    seeded,
)
from ..tuner.checks import shown
from ..utils import distributed
from ..utils.fields import check_count, check_number
from .corpus import read_corpus
from .samples import TextSample


ALIKE = 8  # prompts that the target writes after one and the same list of given ones
# (key of a batch, how to write it) → what was written after each of its prompts
Keep: TypeAlias = Callable[[str, Callable[[], list[str]]], list[str]]


@dataclass(frozen=True)
class SelfWritten:
    """Text that the source model with its LoRA writes, sampled at the start of a translation.

    With none of `prompts`, `prefix` and `template` the model answers snippets of `corpus` in its chat template, or
    continues them if its tokenizer has none. What stands before the model's own words (prompt, prefix, filled
    template) is read by both models, and they are compared on the words alone.

    Args:
        prompts (`tuple[str, ...]`, *optional*): Complete prompts of the kind the adapter answers; a dozen will do.
        more_prompts (`int`, *optional*): How many further prompts the target model writes in the manner of `prompts`.
            By default enough for every text to have its own; 0 for none, the given ones are then answered in turn.
        prefix (`str` or `tuple[str, ...]`, *optional*): What every text starts with (in turn, if several), e.g. the
            first words of the adapter's prompt: `"Question:"`; the model writes prompt and answer.
        template (`str`, *optional*): A prompt with `{text}` in it, filled with snippets of `corpus`.
        chat (`bool`, *optional*): Put the prompt into the chat template, as a user's turn. By default only when
            nothing else is given and the source tokenizer has a chat template.
        on_policy (`bool`): Whether the translated model answers, as `translate(start=...)` found it, instead of the
            adapted source, which is then asked how it would have gone on at each word (on-policy distillation, arXiv
            2306.13649): it learns to get out of what it runs into by itself, such as loops.
        corpus: Where snippets come from, anything `translate(text=...)` takes as a corpus; C4 by default.
        snippet_chars (`int`): Length of a snippet in characters.
        samples (`int`, *optional*): How many texts to write; as many as the refinement reads, if not given.
        max_new_tokens (`int`): The most tokens the model writes per text.
        temperature (`float`): Sampling temperature; 0 takes the likeliest token.
        top_p (`float`): Nucleus sampling.
        batch_size (`int`): Texts written at a time.
    """

    prefix: str | tuple[str, ...] | None = None
    template: str | None = None
    prompts: tuple[str, ...] | None = None
    more_prompts: int | None = None
    chat: bool | None = None
    on_policy: bool = False
    corpus: Any = None
    snippet_chars: int = 200
    samples: int | None = None
    max_new_tokens: int = 160
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64

    def __post_init__(self):
        if sum(given is not None for given in (self.prefix, self.template, self.prompts)) > 1:
            raise ValueError(
                "Pass only one of `prompts`, `prefix` and `template`: a template may start with the prefix."
            )
        if self.template is not None and "{text}" not in self.template:
            raise ValueError(f"`template` must contain '{{text}}', where the snippet goes, got {self.template!r}.")
        for name in ("prefix", "prompts"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_prompts_given(self.prompts)
        check_writing(self)
        if self.prompts is None and self.more_prompts:
            raise ValueError("`more_prompts` needs `prompts`, whose manner they follow.")

    @property
    def reads_snippets(self) -> bool:
        """Whether the model answers snippets of `corpus`."""
        return self.prefix is None and self.prompts is None

    def further(self, count: int) -> int:
        """How many prompts the target writes beside the given ones, for `count` texts; none without any."""
        if self.prompts is None:
            return 0
        return max(0, count - len(self.prompts)) if self.more_prompts is None else self.more_prompts


def check_prompts_given(prompts: Any) -> None:
    """
    Raises:
        ValueError: If prompts are given, and are no sequence of texts.
    """
    if prompts is None:
        return
    if isinstance(prompts, str) or not prompts:
        raise ValueError("`prompts` must be a list of at least one prompt.")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"`prompts` must hold texts that are not empty, got {shown(prompt)} among them.")


def check_writing(spec: Any) -> None:
    """
    Raises:
        ValueError: If a number that says how text is written cannot be used.
    """
    for name in ("samples", "max_new_tokens", "batch_size"):
        check_count(name, getattr(spec, name), 1)
    check_number("temperature", spec.temperature, least=0)
    check_number("top_p", spec.top_p, above=0)


def write_texts(
    model: PreTrainedModel,
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    spec: SelfWritten,
    limit: int,
    seed: int = 0,
    target: PreTrainedModel | PeftModel | None = None,
    progress: Callable[[Iterable], Iterable] | None = None,
    keep: Keep = lambda key, write: write(),
) -> list[TextSample]:
    """Let the model write texts, a batch at a time; a batch depends on nothing but its prompts and the seed.

    Several processes write a part of each batch, other texts than a single process would.

    Args:
        model: The source model with its LoRA active; with `spec.on_policy` the translated model.
        source_tokenizer, target_tokenizer: Of the two models; the target's also for its own chat template.
        spec (`SelfWritten`): What to write.
        limit (`int`): How many texts, unless `spec.samples` is less.
        seed (`int`): Seed of the sampling. The global random state is left as it was.
        target: The target model, which writes further prompts, without its adapter if it has one; when not given,
            `prompts` are answered in turn.
        progress: Wrapper around the batches, e.g. `tqdm`.
        keep: Gives what was written for a key before, or calls its second argument to have it written.

    Raises:
        ValueError: If the model writes nothing but empty texts, or has too few learned positions for a prompt.
    """
    count = min(limit, spec.samples or limit)
    check_prompts_fit(model, source_tokenizer, spec.prompts or ())
    if spec.prompts and target is not None:
        how = (seed, spec.batch_size, progress, keep)
        with target.disable_adapter() if isinstance(target, PeftModel) else nullcontext():
            further = write_prompts(target, target_tokenizer, spec.prompts, spec.further(count), *how)
        spec = replace(spec, prompts=(*spec.prompts, *further))
    prompts = _prompts(spec, source_tokenizer, target_tokenizer, count)
    tokenizer = target_tokenizer if spec.on_policy else source_tokenizer
    return write_answers(model, tokenizer, prompts, spec, seed, progress, keep)


def write_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TextSample],
    spec: SelfWritten,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] | None = None,
    keep: Keep = lambda key, write: write(),
) -> list[TextSample]:
    """What a model writes after each prompt, a batch at a time; empty answers are left out.

    Args:
        model, tokenizer: The source model with its LoRA active; with `spec.on_policy` the translated model.
        prompts: Samples whose text does not matter.
        spec (`SelfWritten`): How to write.
        seed, progress, keep: As in `write_texts`.

    Raises:
        ValueError: If the model writes nothing but empty texts, or has too few learned positions for a prompt.
    """
    who, kind = ("translated", "own answers") if spec.on_policy else ("adapted source", "answers")
    texts = [p.target_prompt if spec.on_policy else p.source_prompt for p in prompts]
    check_prompts_fit(model, tokenizer, texts)
    chunks = []
    for rendered in (False, True):
        alike = [i for i, prompt in enumerate(prompts) if prompt.rendered is rendered]
        # Texts of like length share a batch, which is padded to its longest.
        alike.sort(key=lambda i: len(texts[i]))
        chunks += [alike[i : i + spec.batch_size] for i in range(0, len(alike), spec.batch_size)]
    written = [""] * len(prompts)
    for number, chunk in enumerate(progress(chunks) if progress else chunks):
        options = (spec.max_new_tokens, spec.temperature, spec.top_p, prompts[chunk[0]].rendered)
        asked = [texts[i] for i in chunk]
        for i, text in zip(chunk, _batch(keep, model, tokenizer, asked, options, (kind, seed, number))):
            written[i] = text
    samples = [replace(prompt, text=text) for prompt, text in zip(prompts, written) if text.strip()]
    if not samples:
        raise ValueError(f"The {who} model wrote only empty texts: pass other `prompts` or another `prefix`.")
    return samples


def _prompts(spec: SelfWritten, source_tokenizer, target_tokenizer, count: int) -> list[TextSample]:
    """Samples without a text."""
    starts: Sequence[str]
    if not spec.reads_snippets:
        starts = spec.prompts or ((spec.prefix,) if isinstance(spec.prefix, str) else spec.prefix) or ("",)
    else:
        snippets = [" ".join(text.split())[: spec.snippet_chars] for text in read_corpus(spec.corpus, count)]
        starts = [(spec.template or "{text}").replace("{text}", snippet) for snippet in snippets]
    plain = [starts[i % len(starts)] for i in range(count)]
    has_template = bool(source_tokenizer.chat_template)
    chat = spec.chat if spec.chat is not None else has_template and not (spec.prefix or spec.template or spec.prompts)
    if not chat:
        return [TextSample("", text, text) for text in plain]
    if not has_template:
        raise ValueError("`chat=True`, but the source tokenizer has no chat template: pass `prompts` or `template`.")
    return as_turns(plain, source_tokenizer, target_tokenizer)


def as_turns(
    texts: Sequence[str], source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> list[TextSample]:
    """Samples without a text, prompted by each text as a user's turn in the chat templates.

    Args:
        texts: What the user says.
        source_tokenizer, target_tokenizer: The source's has a template.
    """
    turns = [[{"role": "user", "content": text}] for text in texts]
    source = render_chats(source_tokenizer, turns, "source")
    if target_tokenizer.chat_template:
        target = render_chats(target_tokenizer, turns, "target")
    else:  # it will be prompted as the adapter was trained, and its tokenizer puts its own token before that
        first = beginning_of(target_tokenizer)
        target = [one if one.startswith(first) else first + one for one in source]
    return [TextSample("", *asked, rendered=True) for asked in zip(source, target)]


def write_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    count: int,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[Iterable], Iterable] | None = None,
    keep: Keep = lambda key, write: write(),
) -> list[str]:
    """Up to `count` further prompts in the manner of the given ones (few-shot, as in Self-Instruct, arXiv 2212.10560).

    The model continues a list of four of them, drawn at random; each list `ALIKE` times, so that it is read once. What
    they all begin and end with (`"Question: "`, `"\\nAnswer:"`) is put back around what it writes; unfinished, much
    shorter or longer, and repeated ones are dropped.

    Args:
        model, tokenizer: Any language model with its tokenizer; the target, in a translation.
        prompts: The given prompts.
        count (`int`): How many to write. Fewer come back if the model cannot write so many in a few rounds.
        batch_size (`int`): Prompts written at a time.
        seed, progress, keep: As in `write_texts`; the seed is also that of the draws.
    """
    head, tail = common_affixes(prompts)
    bodies = [prompt[len(head) : len(prompt) - len(tail)] for prompt in prompts]
    # A body ends where the next item of the list begins; within a line, where none of the given ones has a break.
    stop = "\n\n" if any("\n" in body for body in bodies) else "\n"
    lengths = [len(body) for body in bodies]
    sizes = [len(tokenizer(body, add_special_tokens=False).input_ids) for body in bodies]
    if positions := learned_positions(model):  # four of them, and a fifth, are read
        bodies = [body for body, size in zip(bodies, sizes) if 6 * size < positions]
        if not bodies:
            return []
    longest = max(size for size in sizes if not positions or 6 * size < positions)
    draw, seen = random.Random(seed), set(bodies)
    written: list[str] = []
    most = 2 * -(-count // batch_size) + 2
    rounds = takewhile(lambda _: len(written) < count, range(most))  # nobody knows how many it takes
    for number in progress(rounds) if progress else rounds:
        together = min(batch_size, 2 * (count - len(written)))  # about half are of use
        lists = [draw.sample(bodies, min(4, len(bodies))) for _ in range(-(-together // ALIKE))]
        starts = ["".join(f"{head}{body}\n\n" for body in few) + head.rstrip() for few in lists]
        asked = [start for start in starts for _ in range(ALIKE)][:together]
        options = (int(1.3 * longest) + 4, 0.8, 1.0, False, stop)
        for text in _batch(keep, model, tokenizer, asked, options, ("prompts", seed, number)):
            body, found, _ = text.lstrip().partition(stop)
            body = body.rstrip()
            if found and body not in seen and 0.4 * min(lengths) <= len(body) <= 1.6 * max(lengths):
                seen.add(body)
                written.append(f"{head}{body}{tail}")
    return written[:count]


def common_affixes(texts: Sequence[str]) -> tuple[str, str]:
    """What all texts begin with (up to a white space) and end with (from a white space on); of one text, nothing."""
    if len(texts) < 2:
        return "", ""
    head = os.path.commonprefix(list(texts))
    head = head[: max((i + 1 for i, c in enumerate(head) if c.isspace()), default=0)]
    tail = os.path.commonprefix([text[len(head) :][::-1] for text in texts])[::-1]
    tail = tail[next((i for i, c in enumerate(tail) if c.isspace()), len(tail)) :]
    return head, tail


def _batch(keep: Keep, model, tokenizer, asked: list[str], options: tuple, which: tuple[str, int, int]) -> list[str]:
    """What the model writes after each text, or has written before; `options` are those of `_sample`, `which` are the
    batch's kind, seed and number.
    """

    def write() -> list[str]:
        own = (*which, distributed.rank()) if distributed.world_size() > 1 else which
        with seeded(int(_sha256(own)[:15], 16)):
            return _sample(model, tokenizer, asked, *options)

    return keep(_sha256((which, options, asked))[:32], write)


def _sha256(value: tuple) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _sample(
    model,
    tokenizer,
    texts: Sequence[str],
    tokens: int,
    temperature: float,
    top_p: float,
    rendered: bool = False,
    stop: str | None = None,
) -> list[str]:
    """What the model writes after each text, drawn at random, each process its part of them."""
    own, sampling = distributed.split(texts), SampleTopK(temperature, top_p) if temperature else None
    # A process without a part writes too, because a sharded model needs all.
    written = continuations(model, tokenizer, own or texts[:1], tokens, sampling, not rendered, stop, cut=True)
    return distributed.gather(written[: len(own)])
