"""Text written by the adapted source model itself: the text on which an adapter shows what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .corpus import read_corpus
from .samples import TextSample


@dataclass(frozen=True)
class SelfWritten:
    """Text that the source model with its LoRA writes, sampled at the start of a translation.

    With neither `prefix` nor `template` the model answers snippets of `corpus` in its chat template, or continues them
    if its tokenizer has none.

    Args:
        prefix (`str` or `tuple[str, ...]`, *optional*): What every text starts with (in turn, if several), e.g. the
            first words of the adapter's prompt: `"Question:"`.
        template (`str`, *optional*): A prompt with `{text}` in it, filled with snippets of `corpus`.
        chat (`bool`, *optional*): Put the prompt into the chat template, as a user's turn. By default only when
            neither `prefix` nor `template` is given and the source tokenizer has a chat template.
        corpus: Where snippets come from, anything `translate(text=...)` takes as a corpus; C4 by default.
        snippet_chars (`int`): Length of a snippet in characters.
        samples (`int`, *optional*): How many texts to write; as many as the refinement reads, if not given.
        max_new_tokens (`int`): The most tokens the model writes per text.
        temperature (`float`): Sampling temperature.
        top_p (`float`): Nucleus sampling.
        batch_size (`int`): Texts written at a time.
    """

    prefix: str | tuple[str, ...] | None = None
    template: str | None = None
    chat: bool | None = None
    corpus: Any = None
    snippet_chars: int = 200
    samples: int | None = None
    max_new_tokens: int = 160
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64

    def __post_init__(self):
        if self.prefix is not None and self.template is not None:
            raise ValueError("Pass `prefix` or `template`, not both: a template may start with the prefix.")
        if self.template is not None and "{text}" not in self.template:
            raise ValueError(f"`template` must contain '{{text}}', where the snippet goes, got {self.template!r}.")
        if isinstance(self.prefix, list):
            object.__setattr__(self, "prefix", tuple(self.prefix))


def write_texts(
    model: PreTrainedModel,
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    spec: SelfWritten,
    limit: int,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> list[TextSample]:
    """Let the model write texts.

    Args:
        model: The source model with its LoRA active.
        source_tokenizer: Its tokenizer.
        target_tokenizer: The target's tokenizer, for the target's own chat template.
        spec (`SelfWritten`): What to write.
        limit (`int`): How many texts, unless `spec.samples` is less.
        seed (`int`): Seed of the sampling. The global random state is left as it was.
        progress: Wrapper around the batches, e.g. `tqdm`.

    Raises:
        ValueError: If the model writes nothing but empty texts.
    """
    prompts = _prompts(spec, source_tokenizer, target_tokenizer, min(limit, spec.samples or limit))
    chunks = [prompts[i : i + spec.batch_size] for i in range(0, len(prompts), spec.batch_size)]
    devices = [model.device] if model.device.type == "cuda" else []
    samples = []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for chunk in progress(chunks) if progress else chunks:
            written = _generate(model, source_tokenizer, spec, chunk)
            samples += [prompt.followed_by(text) for prompt, text in zip(chunk, written) if text.strip()]
    if not samples:
        raise ValueError("The adapted source model wrote only empty texts: pass another `prefix` or `template`.")
    return samples


@dataclass(frozen=True)
class _Prompt:
    source: str
    target: str
    chat: bool  # rendered by a chat template, special tokens included

    def followed_by(self, written: str) -> TextSample:
        return TextSample(written, self.source, self.target) if self.chat else TextSample(self.source + written)


def _prompts(spec: SelfWritten, source_tokenizer, target_tokenizer, count: int) -> list[_Prompt]:
    if spec.prefix is not None:
        prefixes = (spec.prefix,) if isinstance(spec.prefix, str) else spec.prefix
        plain = [prefixes[i % len(prefixes)] for i in range(count)]
    else:
        snippets = [" ".join(text.split())[: spec.snippet_chars] for text in read_corpus(spec.corpus, count)]
        template = spec.template or "{text}"
        plain = [template.replace("{text}", snippets[i % len(snippets)]) for i in range(count)]
    has_template = bool(source_tokenizer.chat_template)
    chat = spec.chat if spec.chat is not None else has_template and not (spec.prefix or spec.template)
    if not chat:
        return [_Prompt(text, text, chat=False) for text in plain]
    if not has_template:
        raise ValueError("`chat=True`, but the source tokenizer has no chat template: pass `prefix` or `template`.")
    prompts = []
    for text in plain:
        turn = [{"role": "user", "content": text}]
        source = source_tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        # A target without a template will be prompted as the adapter was trained.
        target = source
        if target_tokenizer.chat_template:
            target = target_tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompts.append(_Prompt(source, target, chat=True))
    return prompts


def _generate(model, tokenizer, spec: SelfWritten, prompts: list[_Prompt]) -> list[str]:
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    tokenizer.pad_token = pad or tokenizer.eos_token
    try:
        # A rendered chat template already holds its special tokens.
        texts = [prompt.source for prompt in prompts]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not prompts[0].chat)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            output = model.generate(
                **inputs.to(model.device),
                do_sample=True,
                temperature=spec.temperature,
                top_p=spec.top_p,
                top_k=0,
                max_new_tokens=spec.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, pad
    written = output[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(written, skip_special_tokens=True)
