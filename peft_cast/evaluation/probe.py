"""What does an unknown adapter do? Asked, and answered with it and without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..models import moved, untouched
from ..options import OF_COMMANDS, Options, Pairing, Run, takes
from ..source import Card, adapted_source, check_source, load_source, named_source, read_card, source_tokenizer
from ..text import (
    DOCUMENTS,
    Survey,
    Surveyor,
    Tried,
    answer_of,
    by_form,
    check_prompts_given,
    compared,
    in_turn,
    mean_acts,
    ranked,
    read_corpus,
)
from ..tuner.checks import number_of
from ..utils import as_path, distributed, without_secrets


FORMS = 32  # that are tried at first: two to three minutes on two cores for a small model
SHOWN, EXAMPLES, WIDTH = 8, 2, 100  # kinds of prompts, examples of each, characters of one


@dataclass(frozen=True)
class Kind:
    """One kind of prompt.

    Args:
        form (`str`): How it is asked, with `{text}` where the content goes.
        acts (`float`): How much the adapter acts there: the log-ratio of the answer's probability with and without it,
            in nats, summed over its n tokens, by √n; a mean over the prompts.
        prompts (`int`): How many were asked.
        examples: Each with `content`, and the likeliest answers `with` and `without` the adapter.
    """

    form: str
    acts: float
    prompts: int
    examples: list[dict[str, str]]


@dataclass(frozen=True)
class Probe:
    """What was found of an adapter.

    Args:
        adapter (`str`): Its name.
        kinds (`list[Kind]`): Kinds of prompts, those first in which it acts most.
        everywhere (`float`): How much it acts on prompts of all kinds, a mean.
        asked (`int`): How many prompts were asked.
    """

    adapter: str
    kinds: list[Kind]
    everywhere: float
    asked: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        asked = number_of(self.asked, "prompt")
        lines = [f"{self.adapter}: asked {asked}; over all of them it acts {self.everywhere:.2f}."]
        for kind in self.kinds:
            lines += ["", f"acts {kind.acts:.2f} on {kind.form!r}"]
            for one in kind.examples:
                lines += [f"  {name:<8}{_short(one[key])}" for name, key in _ROWS.items()]
        return "\n".join(lines)


_ROWS = {"asked": "content", "with": "with", "without": "without"}


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


@takes(OF_COMMANDS["probe"])
def probe(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel,
    *,
    prompts: Sequence[str] | None = None,
    pairing: Pairing | None = None,
    run: Run | None = None,
    **options: Any,
) -> Probe:
    """Find out what an adapter does, from nothing but the adapter and its model.

    Prompts of many forms on many things are asked, and more in those forms in which the adapter changes the answers
    most (`Survey`). No target is needed.

    Args:
        source: The model the adapter was trained on: hub id, path or loaded model. `None` takes it from the adapter.
        adapter: The adapter: hub id, path, or a PeftModel.
        prompts (*optional*): Prompts of yours to ask instead.
        pairing (`Pairing`), run (`Run`): Groups of options.
        options: `source_tokenizer`, `source_revision`, `adapter_revision`, `source_rank`, `device`, `dtype`,
            `fit_text` (what is asked about), `seed`, `progress`.

    Returns:
        `Probe`: It prints as text, and `as_dict()` is JSON-ready.

    Raises:
        ValueError, OSError: As `translate`, for the source, the adapter and the text.
    """
    chosen = Options.of(options, probe, pairing=pairing, run=run)
    pairing, seed = chosen.pairing, chosen.training.seed
    check_prompts_given(prompts)
    source, adapter = as_path(source), as_path(adapter)
    source, pairing = named_source(source, adapter, pairing)
    check_source(source, adapter, pairing)
    tokenizer = source_tokenizer(source, adapter, pairing)
    if prompts is None:  # before models are loaded: it may be out of reach
        spec = Survey(corpus=read_corpus(chosen.fit.fit_text, DOCUMENTS, "fit_text"))
    else:
        spec = Survey(prompts=tuple(prompts))
    device = distributed.init(pairing.device)
    model = load_source(source, adapter, device, pairing.source_revision, pairing.adapter_revision, pairing.dtype)
    adapt = partial(
        adapted_source, adapter=adapter, revision=pairing.adapter_revision, source_rank=pairing.source_rank
    )
    with untouched(adapter if isinstance(adapter, PeftModel) else model), moved(model, device), adapt(model) as given:
        card = read_card(adapter, pairing.adapter_revision) if isinstance(adapter, (str, Path)) else Card()
        at_work = Surveyor(given.model, (tokenizer, tokenizer), spec, seed, card=card)
        bar = partial(tqdm, disable=not chosen.run.progress, desc="asking")
        tried = compared(at_work, FORMS, bar)
        kinds = _kinds(at_work, tried)
    name = adapter.active_adapter if isinstance(adapter, PeftModel) else without_secrets(adapter)
    return Probe(str(name), kinds, mean_acts(tried), len(tried))


def _kinds(at_work: Surveyor, tried: Sequence[Tried]) -> list[Kind]:
    """The kinds of prompts in which the adapter acts most, with examples."""
    kinds = []
    forms = by_form(tried)
    for form in list(ranked(tried))[:SHOWN]:
        own = forms[form]
        shown = in_turn(sorted(own, key=lambda one: -one.acts), answer_of)[:EXAMPLES]
        examples = [
            {"content": one.content, "with": one.answer, "without": plain}
            for one, plain in zip(shown, at_work.plain_answers(shown))
        ]
        kinds.append(Kind(str(form), mean_acts(own), len(own), examples))
    return kinds
