"""The text of a translation, as both models read it: what is imitated, held out, fitted on, and anchors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from peft import PeftModel

from ..align import AlignedPair
from ..options import Fit, Training
from ..source import Card, Pair
from ..tuner.checks import number_of
from .mixture import is_written, read_text
from .samples import TextSample, align_samples
from .survey import Survey, Surveyed, Surveyor, write_survey
from .written import Keep, SelfWritten, write_texts


ANCHOR_EVERY = 4  # texts per anchor


def anchor_length(max_length: int) -> int:
    """The most tokens of an anchor where a text has `max_length`: many short stretches say more than few long ones."""
    return max(max_length // 2, 16)


@dataclass(frozen=True)
class PairTexts:
    """Aligned texts by what they are for.

    Args:
        train: Read by the refinement.
        held_out: Kept out of it to measure the distance to the teacher. With few prompts the two may share prompts,
            never answers.
        fit: Read by the closed form.
        anchors: General text on which the target shall stay as it is; empty when it may move.
        metrics: Counts and shares, JSON-ready.
        answers: What was written after a prompt to be trained on, as text; of a survey, where the adapter acts.
    """

    train: list[AlignedPair]
    held_out: list[AlignedPair]
    fit: list[AlignedPair]
    anchors: list[AlignedPair]
    metrics: dict[str, Any]
    answers: list[TextSample] = field(default_factory=list)


def read_texts(
    pair: Pair,
    text: Any,
    fit: Fit | None = None,
    training: Training | None = None,
    *,
    bar: Callable = lambda items, **_: items,
    translated: PeftModel | None = None,
    keep: Keep = lambda key, write: write(),
) -> PairTexts:
    """Read, write and align the text of a translation.

    Args:
        pair (`Pair`): The models.
        text: What is imitated on: anything `translate(text=...)` takes.
        fit (`Fit`, *optional*): General text for the closed form and the anchors, and how much of it.
        training (`Training`, *optional*): How much text is read and how long it is. Where `gamma` asks for anchors
            there are as many as the texts to train on can use, at most 512; they follow the texts of the closed form,
            and if the text ends before, they are the same.
        bar: Wrapper around batches that shows progress, e.g. `tqdm`.
        translated: The target with the adapter to go on from, which writes on-policy text.
        keep: Where written batches are kept, see `write_texts`.

    Raises:
        ValueError: If too little of the text is usable.
    """
    fit, training = fit or Fit(), training or Training()
    fit_text, train, max_length = fit.fit_text, training.steps * training.batch_size, training.max_length

    surveys: list[Surveyed] = []

    def write(spec: SelfWritten | Survey, limit: int) -> list[TextSample]:
        if isinstance(spec, Survey):
            if spec.corpus is None:
                spec = replace(spec, corpus=[sample.text for sample in general])
            writer = translated or pair.target
            card = pair.asked() if spec.card else Card()
            at_work = Surveyor(pair.adapted, pair.tokenizers, spec, training.seed, writer, keep, card)
            surveys.append(write_survey(at_work, limit, partial(bar, desc="asking")))
            return surveys[-1].samples
        if spec.on_policy and translated is None:
            raise ValueError("On-policy text is written by a translated model: pass its adapter as `start`.")
        writer, target = (translated if spec.on_policy else pair.adapted), translated or pair.target
        progress = partial(bar, desc="writing text")
        return write_texts(writer, *pair.tokenizers, spec, limit, training.seed, target, progress, keep)

    align = partial(align_samples, pair.tokenizers, max_length=max_length)
    if text is None:
        text = Survey()
    apart = fit_text is not None or is_written(text)  # whether the closed form reads other text than the refinement
    wanted = train if apart else max(train, fit.fit_samples)
    anchors = min(512, max(1, train // ANCHOR_EVERY)) if training.anchor_weight > 0 else 0
    # First: whether it can be reached is known before minutes of writing.
    most = fit.fit_samples + anchors + training.eval_samples
    general = read_text(fit_text, most, write, "fit_text") if apart else []
    # The same text twice says nothing new, and must not be trained on and measured with.
    samples = read_text(text, max(3, wanted + training.eval_samples), write)
    aligned = align(samples)
    pairs = list(dict.fromkeys(aligned))
    if len(pairs) < 3:
        _check_prompts_fit(pair, samples, max_length)
        few, same = len(samples) - len(aligned), len(aligned) - len(pairs)
        why = f"; of {number_of(len(samples), 'text')} {few} have too few tokens, and {same} begin as others do"
        raise ValueError(
            f"The text gives {number_of(len(pairs), 'usable sample')}, at least 3 are needed (to train on and to "
            f"measure with){why if few or same else ''}: pass more or longer text, or a larger `max_length` than "
            f"{max_length}."
        )
    kept_out = how_many_held_out(pairs, training.eval_samples)
    evaluation, trained_on = pairs[:kept_out], pairs[kept_out:]
    seen = set(evaluation)
    unseen = [one for one in align(general) if one not in seen] if apart else trained_on
    fitting = unseen[: fit.fit_samples]
    usable = min(anchors, -(-len(trained_on) // ANCHOR_EVERY))
    rest = general[fit.fit_samples :] or general
    anchored = align(rest[:usable], max_length=anchor_length(max_length)) if usable else []
    if len(fitting) < 2:
        raise ValueError(
            f"`{'fit_text' if apart else 'text'}` gives {number_of(len(fitting), 'usable sample')} for the closed "
            "form, at least 2 are needed: pass more or longer text."
        )
    metrics = {
        "train": len(trained_on),
        "held_out": len(evaluation),
        "closed_form": len(fitting),
        "anchors": len(anchored),
        "target_tokens": sum(len(one.target_ids) for one in pairs),
        "aligned_positions": sum(len(one.target_positions) for one in pairs),
        **({"survey": surveys[0].found} if surveys else {}),
    }
    answers = [sample for sample in samples[kept_out:] if sample.target_prompt]
    if surveys:  # whose broad part is not the adapter's task
        focus = frozenset().union(*(found.focus for found in surveys))
        answers = [sample for sample in answers if sample.target_prompt in focus]
    return PairTexts(trained_on, evaluation, fitting, anchored, metrics, answers)


def read_fit_texts(pair: Pair, text: Any, fit: Fit, training: Training) -> PairTexts:
    """General text alone, for the closed form of several adapters; Args as in `read_texts`."""
    general, argument = (fit.fit_text, "fit_text") if fit.fit_text is not None else (text, "text")
    if is_written(general):
        general, argument = None, "fit_text"
    samples = read_text(general, fit.fit_samples, lambda *_: [], argument)
    texts = align_samples(pair.tokenizers, samples, training.max_length)
    return PairTexts([], [], texts, [], {"closed_form": len(texts)})


def _check_prompts_fit(pair: Pair, samples: Sequence[TextSample], max_length: int) -> None:
    """
    Raises:
        ValueError: If in one of the models every prompt alone is as long as a text may be.
    """
    for tokenizer, side in zip(pair.tokenizers, ("source", "target")):
        prompts = [getattr(sample, f"{side}_prompt") for sample in samples[:8]]
        tokens = [len(tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in prompts if prompt]
        if tokens and min(tokens) >= max_length - 4:
            raise ValueError(
                f"The prompts have {min(tokens)} tokens of the {side} model and more, with the chat template around "
                f"them, and `max_length` is {max_length}, so no answer is read: pass a larger `max_length`, a smaller "
                f"`snippet_chars`, or a tokenizer with another template as `{side}_tokenizer`."
            )


def how_many_held_out(pairs: Sequence[AlignedPair], wanted: int) -> int:
    """Of how many texts the distance to the teacher is measured: those wanted, at most a third, and at least one."""
    return min(wanted, len(pairs) // 3 or 1)
