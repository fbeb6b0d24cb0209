"""Text for an adapter of which nothing is known: ask broadly, see where the adapter acts, ask more of that kind."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import check_prompts_fit, fitting
from ..source import Card
from .closings import KINDS, acting_forms
from .corpus import read_corpus
from .forms import FROM_CORPUS, Contents, Form, drawn_forms, package_forms, taken_apart
from .judged import moved_nats, token_nats_of
from .ranking import Tried, by_form, crossed, described, exciting, in_turn, ranked, recurring, the_best, weighed
from .rows import read_asked
from .samples import TextSample
from .written import Keep, SelfWritten, as_turns, check_prompts_given, check_writing, write_answers, write_prompts


SCREENING = 3  # forms in which every everyday question is asked, to find those that excite the adapter
# Forms that are tried at first and contents in each; then what is left of them, with further contents in each.
FORMS, CONTENTS = 48, 4
ROUNDS = ((12, 4), (6, 4))
SHORT, END = 24, ""  # tokens of an answer while forms are compared, and what stands for its end
MOST = 2.0  # nats that one token can count: a single surprising one says little
LITTLE = 0.5  # `acts` of the best form below which it is said that the adapter hardly does anything
EXAMPLES = 8  # of its card and datasets that are asked at first
ENOUGH_PROMPTS = 4  # to know the form from what they have in common
DOCUMENTS = 256  # that contents are taken from


@dataclass(frozen=True)
class Survey:
    """Text for an adapter of which nothing is known, found out by asking.

    The adapted source answers prompts of many forms (`Question: …`, `Review: … Sentiment:`, its chat template, code,
    several languages) on many things, among them forms with the last lines after which the adapter moves the next
    token most. The forms and contents on which it changes its answers most are asked more; the rest of the texts stay
    broad.

    Args:
        prompts (`tuple[str, ...]`, *optional*): One to three prompts of the kind the adapter answers, if you have any:
            the survey then starts from them. From four on `SelfWritten(prompts=...)` needs no survey.
        forms (`Mapping`, *optional*): Words, templates and contents to ask with instead of the package's
            (`peft_cast/text/forms.json`), with the same keys.
        card (`bool`): Whether what the adapter's own card says is asked too: its examples (`widget`), templates of
            prompts in its text, and the first rows of the datasets that it names (`datasets`), where they can be
            reached. What was used is named in `metrics["text"]["survey"]`.
        breadth (`float`): Share of the texts that is asked in forms of all kinds.
        corpus: Where contents come from, anything `translate(text=...)` takes as a corpus; `fit_text` by default.
        samples (`int`, *optional*): How many texts to write; as many as the refinement reads, if not given.
        max_new_tokens (`int`): The most tokens of an answer that is trained on.
        temperature (`float`): Sampling temperature of those; 0 takes the likeliest token. At 1 a small model that is
            asked what it was not trained on loses the thread, and what the adapter says with it.
        top_p (`float`): Nucleus sampling.
        batch_size (`int`): Texts written at a time.
    """

    prompts: tuple[str, ...] | None = None
    forms: Mapping[str, Any] | None = None
    card: bool = True
    breadth: float = 0.25
    corpus: Any = None
    samples: int | None = None
    max_new_tokens: int = 160
    temperature: float = 0.7
    top_p: float = 1.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.prompts, list):
            object.__setattr__(self, "prompts", tuple(self.prompts))
        check_prompts_given(self.prompts)
        check_writing(self)
        if not 0 <= self.breadth <= 1:
            raise ValueError(f"`breadth` is a share of the texts, from 0 to 1, got {self.breadth}.")
        missing = sorted(set(package_forms()) - set(self.forms or package_forms()))
        if missing:
            raise ValueError(f"`forms` lacks {', '.join(missing)}: give every key of peft_cast/text/forms.json.")

    @property
    def writing(self) -> SelfWritten:
        """How its answers are written."""
        return SelfWritten(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Surveyed:
    """What came of a survey.

    Args:
        samples (`list[TextSample]`): The texts.
        focus (`frozenset[str]`): The target's prompts of those that are of the kinds in which the adapter acts.
        found (`dict`): JSON-ready: how many `examples` of its card were asked, the `templates` quoted there, and its
            `datasets` that were read; the `words` that recur as answers, if it is a classifier; the `forms` that were
            asked for good, with how much the adapter `acts` there, how many `prompts` that is known from, and an
            `example`; whether they are `trusted`: it acts in one of them.
    """

    samples: list[TextSample]
    focus: frozenset[str]
    found: dict[str, Any]


class Surveyor:
    """The models of a survey, and how they are asked.

    Args:
        model: The source model with its adapter active, which can be disabled.
        tokenizers: Those of source and target; twice the source's without a target.
        spec (`Survey`): What to do.
        seed (`int`): Seed of all draws. The global random state is left as it was.
        target: The model that writes further contents, without its adapter if it has one; the plain source when not
            given.
        keep: As in `write_texts`.
        card (`Card`): What the adapter's card says; not heeded where the user gave prompts.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
        spec: Survey,
        seed: int = 0,
        target: PreTrainedModel | PeftModel | None = None,
        keep: Keep = lambda key, write: write(),
        card: Card = Card(),
    ) -> None:
        self.model, self.tokenizers, self.spec, self.seed, self.keep = model, tokenizers, spec, seed, keep
        self.target = target
        self.known = spec.forms or package_forms()
        self.draw = random.Random(seed)
        chat = bool(tokenizers[0].chat_template)
        self.card = card if spec.card and not spec.prompts else Card()
        self.datasets = {name: read_asked(name) for name in self.card.datasets}
        rows = [one for asked in self.datasets.values() for one in asked]
        examples = [
            (Form("{text}", "given", chat=True), text) if is_chat else taken_apart(text)
            for text, is_chat in (*self.card.examples, *rows)
            if is_chat is not None and (chat or not is_chat)
        ]
        self.examples = examples[:EXAMPLES]
        # Contents that are had before all others of their kind.
        self.own = {
            "given": [content for _, content in examples[EXAMPLES:]],
            "question": [text for text, is_chat in rows if is_chat is None or (is_chat and not chat)],
        }
        self.short = replace(spec.writing, max_new_tokens=SHORT, temperature=0.0)

    @cached_property
    def contents(self) -> Contents:
        """What there is to ask about."""
        given = [content for _, content in self.examples]
        return Contents(self.known, self.draw, read_corpus(self.spec.corpus, DOCUMENTS), given)

    def write(self, prompts: Sequence[str], count: int) -> list[str]:
        """Further prompts in the manner of the given ones, by the model that writes them."""
        writer, tokenizer = (
            (self.model, self.tokenizers[0]) if self.target is None else (self.target, self.tokenizers[1])
        )
        plain = writer.disable_adapter() if isinstance(writer, PeftModel) else nullcontext()
        with plain:
            return write_prompts(writer, tokenizer, prompts, count, self.seed, self.spec.batch_size, keep=self.keep)

    def prompts(self, asked: Sequence[tuple[Form, str]]) -> list[TextSample]:
        """Samples without a text, in the order asked."""
        samples: list[TextSample] = []
        for form, content in asked:
            text = form.fill(content)
            samples += as_turns([text], *self.tokenizers) if form.chat else [TextSample("", text, text)]
        return samples

    def answers(self, asked: Sequence[tuple[Form, str]], how: SelfWritten) -> dict[TextSample, tuple[Form, str]]:
        """What the adapted source answers, where it answers at all, and to what."""
        of = dict(zip(self.prompts(asked), asked))
        found = write_answers(self.model, self.tokenizers[0], self._read_whole(of), how, self.seed, keep=self.keep)
        return {one: of[replace(one, text="")] for one in found}

    def _read_whole(self, prompts: Iterable[TextSample]) -> list[TextSample]:
        """Those that the source has learned positions for; the examples of a card may be of any length."""
        prompts = list(prompts)
        fits = fitting(self.model, self.tokenizers[0], [one.source_prompt for one in prompts])
        return [one for one, fit in zip(prompts, fits) if fit]

    def ask(self, asked: Sequence[tuple[Form, str]]) -> list[Tried]:
        """How the adapted source begins its likeliest answers, and what the adapter has to do with it."""
        answers: dict[TextSample, tuple[Form, str]] = {}
        with suppress(ValueError):  # it ends everywhere at once
            answers = self.answers(asked, self.short)
        items = [(one, one.text) for one in answers]
        adapted = token_nats_of(self.model, self.tokenizers[0], items, SHORT)
        with self.model.disable_adapter():
            plain = token_nats_of(self.model, self.tokenizers[0], items, SHORT)
        found = {}
        for (one, of), a, b in zip(answers.items(), adapted, plain):
            tokens = self.tokenizers[0].tokenize(one.text) + [END]
            ratios = (b - a).clamp(-MOST, MOST).tolist()
            found[of] = one.text, tuple(tokens[: len(ratios)]), tuple(ratios)
        return [Tried(*one, *found.get(one, ("",))) for one in asked]

    def screened(self, forms: Sequence[Form]) -> list[Tried]:
        """The everyday questions, in a few of the forms of questions, the chat template among them."""
        few = sorted((form for form in forms if form.content == "question"), key=lambda form: not form.chat)
        return self.ask([(form, one) for form in few[:SCREENING] for one in self.known["everyday"]])

    def acting_forms(self) -> list[Form]:
        """Forms of which the adapter's own last lines are known: after them it moves the next token most."""
        moved = partial(moved_nats, self.model, self.tokenizers[0], batch_size=self.spec.batch_size)
        return acting_forms(moved, self.tokenizers[0], self.known, {kind: self.contents.next(kind) for kind in KINDS})

    def plain_answers(self, tried: Sequence[Tried]) -> list[str]:
        """What the source answers to prompts without the adapter, likeliest first; empty where it ends at once."""
        prompts = self.prompts([(one.form, one.content) for one in tried])
        written: list[TextSample] = []
        with self.model.disable_adapter(), suppress(ValueError):  # it ends everywhere at once
            written = write_answers(self.model, self.tokenizers[0], self._read_whole(prompts), self.short, self.seed)
        texts = {replace(one, text=""): one.text for one in written}
        return [texts.get(prompt, "") for prompt in prompts]


def write_survey(at_work: Surveyor, limit: int, progress: Callable[[Iterable], Iterable] | None = None) -> Surveyed:
    """Find out what an adapter answers, and let it answer that.

    Args:
        at_work (`Surveyor`): Who asks.
        limit (`int`): How many texts, unless `Survey.samples` is less.
        progress: Wrapper around the rounds.

    Raises:
        ValueError: If the model writes nothing but empty texts.
    """
    spec = at_work.spec
    count = min(limit, spec.samples or limit)
    # 1. Ask broadly, and more and more in the forms in which the adapter acts most.
    tried = compared(at_work, min(FORMS, max(8, count // 4)), progress)
    if not any(one.answer for one in tried):
        raise ValueError(
            "The adapted source model ends at once whatever it is asked: pass prompts of the kind that its adapter "
            "answers, `text=SelfWritten(prompts=[...])`."
        )
    best = list(ranked(tried)) if spec.prompts else the_best(tried)
    # 2. Think of more to ask in these: what is like the contents that excite it most.
    focus = count if spec.prompts else count - round(spec.breadth * count)
    words = recurring(tried)
    asked = more_like_the_best(at_work, tried, best, focus * (2 if words else 1))
    # 3. The rest stays broad: a prompt of every other form, those first in which the adapter acts most.
    acts = weighed(tried)
    wide = sorted((one for one in tried if one.form not in best and one.answer), key=lambda one: -acts[one])
    others = [(one.form, one.content) for one in in_turn(wide, lambda one: one.form)]
    # 4. Answer all at length; of a classifier's answers its own words alone, each as often as the others.
    first, then = others[: count - focus], others[count - focus :]
    answers = at_work.answers([*asked, *first], spec.writing)
    broad = [one for one, of in answers.items() if of in first]
    kept = [one for one, of in answers.items() if of not in first]
    if words:  # which are known better by now
        words = recurring([*tried, *(Tried(*of, one.text) for one, of in answers.items())])
        kept = in_turn([one for one in kept if one.text.strip() in words], lambda one: one.text.strip())
    kept = kept[:focus]
    focused = frozenset(one.target_prompt for one in kept)
    if len(kept) + len(broad) < count and then:
        broad += at_work.answers(then[: count - len(kept) - len(broad)], spec.writing)
    kept += broad
    at_work.draw.shuffle(kept)
    own = by_form(tried)
    forms = [described(form, own[form]) for form in best]
    found = {
        "examples": len(at_work.examples),
        "templates": list(at_work.card.templates),
        "datasets": [name for name, asked in at_work.datasets.items() if asked],
        "words": words,
        "forms": forms,
        "trusted": max(form["acts"] for form in forms) >= LITTLE,
    }
    if not found["trusted"]:
        warnings.warn(
            "The adapter hardly acts on what it was asked: what it was trained for may not be among it. Pass "
            f"{'other' if spec.prompts else 'one to three'} prompts of its kind, `text=Survey(prompts=[...])`."
        )
    return Surveyed(kept, focused, found)


def compared(at_work: Surveyor, forms: int, progress: Callable[[Iterable], Iterable] | None = None) -> list[Tried]:
    """Prompts in many forms, and then again in those in which the adapter acts most (successive halving).

    Forms for the same kind of content are asked about the same contents, so that they can be compared. From round to
    round further contents follow those that excited the adapter most.

    Args:
        at_work (`Surveyor`): Who asks.
        forms (`int`): How many forms are tried at first.
        progress: Wrapper around the rounds.
    """
    if at_work.spec.prompts:  # whose form is known
        check_prompts_fit(at_work.model, at_work.tokenizers[0], at_work.spec.prompts)
        return at_work.ask([taken_apart(prompt) for prompt in at_work.spec.prompts])
    chat = bool(at_work.tokenizers[0].chat_template)
    templates = [Form(frame, "question") for frame in at_work.card.templates]  # first: they are screened too
    acting = at_work.acting_forms()
    drawn = drawn_forms(at_work.known, at_work.draw, max(forms // 2, forms - len(acting)), chat)
    there = [*dict.fromkeys([*templates, *acting, *drawn, *(form for form, _ in at_work.examples)])]
    rounds = [(len(there), CONTENTS), *((n, each) for n, each in ROUNDS if n < len(there))]
    screened = at_work.screened(there)
    contents = {kind: found[: CONTENTS // 2] for kind, found in exciting(screened, there).items()}
    tried: list[Tried] = []
    for number, (left, each) in enumerate(progress(rounds) if progress else rounds):
        some = list(ranked(tried))[:left] if number else there
        if number == 1:
            some += [form for form in crossed(some) if form not in by_form(tried)]
        seeds = exciting(tried, some)
        for kind in dict.fromkeys(form.content for form in some):
            known = contents.setdefault(kind, [])
            known += further(at_work, kind, seeds.get(kind, []), each - (0 if number else len(known)))
        asked = [(form, content) for form in some for content in dict.fromkeys(contents[form.content])]
        before = {(one.form, one.content) for one in tried}
        asked += [] if tried else at_work.examples
        tried += at_work.ask([one for one in dict.fromkeys(asked) if one not in before])
    return tried


def further(at_work: Surveyor, kind: str, seeds: Sequence[str], count: int) -> list[str]:
    """Contents of a kind: in the manner of the given ones and, as far as the adapter's datasets or a corpus have such,
    of theirs.
    """
    most, own = count // 2 if seeds else count, at_work.own.get(kind, [])
    more = [own.pop(0) for _ in range(min(most, len(own)))]
    if not seeds or kind in FROM_CORPUS:
        more += [at_work.contents.next(kind) for _ in range(most - len(more))]
    written = at_work.write(seeds, count - len(more)) if count > len(more) else []
    return [one for pair in zip_longest(written, more) for one in pair if one is not None]


def more_like_the_best(
    at_work: Surveyor, tried: Sequence[Tried], best: Sequence[Form], count: int
) -> list[tuple[Form, str]]:
    """Prompts in the best forms about the contents that excite the adapter most, and about more in their manner."""
    fresh = {}
    for kind, seeds in exciting(tried, best).items():
        share = -(-count * sum(form.content == kind for form in best) // len(best))
        fresh[kind] = iter([*dict.fromkeys([*seeds, *further(at_work, kind, seeds, share)])])
    asked: list[tuple[Form, str]] = []
    turns = list(best)
    while turns and len(asked) < count:
        form = turns.pop(0)
        content = next(fresh.get(form.content, iter(())), None)  # none where it ends at once
        if content is not None:
            asked.append((form, content))
            turns.append(form)
    return asked
