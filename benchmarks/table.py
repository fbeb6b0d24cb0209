"""The table: how much of an adapter survives, beside the honest alternatives.

    make bench                                                # everything, hours on 2 cores; resumes where it stopped
    .venv/bin/python benchmarks/table.py --pair smollm2-gemma3 --task gsm8k --seeds 0 1 2

Writes docs/figures/table_<pair>_<task>.json and .png. Adapters are kept in bench-output/ and made only once.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import setting

import peft_cast
from peft_cast import baselines
from peft_cast.utils.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=setting.PAIRS, default="smollm2-gemma3")
    parser.add_argument("--task", choices=setting.TASKS, default="gsm8k")
    parser.add_argument("--modules", choices=["all", "qv"], default="all", help="which modules the source LoRA adapts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the headline row")
    parser.add_argument("--no-source", action="store_true", help="do not measure the source with its own LoRA")
    parser.add_argument("--rows", nargs="+", default=DEFAULT, choices=list(ROWS))
    parser.add_argument(
        "--same-code",
        action="store_true",
        help="rows of the table that are kept were made by code that does what today's does",
    )
    args = parser.parse_args()
    source, target = setting.PAIRS[args.pair]
    adapters: dict[str, list[Path]] = {}
    for row in args.rows:
        seeds = args.seeds if row in HEADLINE else args.seeds[:1]
        made = [make(row, seed, source, target, args) for seed in seeds]
        if all(made):
            adapters[row] = made
    adapters["retrained"] = [target.adapter(args.task, args.modules)]
    name = f"table_{args.pair}_{args.task}" + ("" if args.modules == "all" else f"_{args.modules}")
    file = setting.FIGURES / f"{name}.json"
    before = peft_cast.Evaluation.load(file) if file.exists() else None
    evaluation = peft_cast.evaluate(
        target.folder(),
        adapters,
        setting.tasks(args.task),
        retrained="retrained",
        drift_text=setting.c4_documents()[1],
        drift_samples=setting.DRIFT_DOCUMENTS,
        output=file,
    )
    if before is not None:
        evaluation = with_earlier(evaluation, before, args.same_code)
        known = json.loads(file.read_text(encoding="utf-8"))["known"]
        write_json({**evaluation.to_dict(), "known": known}, file)
    evaluation.plot(setting.FIGURES / f"{name}.png")
    print(evaluation)
    if args.no_source:
        return
    # The source with its own LoRA: how good the teacher is.
    own = peft_cast.evaluate(
        source.folder(),
        {"source LoRA": source.adapter(args.task, args.modules)},
        setting.tasks(args.task),
        output=setting.FIGURES / f"{name.replace('table', 'source', 1)}.json",
    )
    print(own)


def with_earlier(
    evaluation: peft_cast.Evaluation, before: peft_cast.Evaluation, same_code: bool = False
) -> peft_cast.Evaluation:
    """The evaluation with the rows of `before` that were not asked for this time.

    `settings["earlier"]` names those made by earlier code: all of them, or those that were it before if it is the
    `same_code`.
    """
    names = {m.adapter for m in evaluation.measurements}
    kept = [m for m in before.measurements if m.adapter not in names]
    of = {
        row: [m for m in (*evaluation.measurements, *kept) if m.adapter == row] for row in ("base", *ROWS, "retrained")
    }
    earlier = {m.adapter for m in kept}
    if same_code:
        earlier &= set(before.settings.get("earlier", ()))
    settings = {**evaluation.settings, "earlier": sorted(earlier)}
    return peft_cast.Evaluation(tuple(m for group in of.values() for m in group), evaluation.retrained, settings)


def make(row: str, seed: int, source, target, args) -> Path | None:
    """The adapter of a row, made unless it is there already; `None` where a direct copy does not apply."""
    name = row.replace(",", "").replace(" ", "-")
    folder = setting.OUTPUT / f"{args.pair}_{args.task}_{args.modules}" / f"{name}_seed{seed}"
    if (folder / "adapter_config.json").exists():
        return folder
    print(f"\n{row}, seed {seed}", flush=True)
    # A rename in the end: a killed run leaves no half-made adapter behind, and goes on from its checkpoint.
    partial, run = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".run")
    shutil.rmtree(partial, ignore_errors=True)
    paths = source.folder(), source.adapter(args.task, args.modules), target.folder()
    try:
        result = ROWS[row](*paths, args, seed, run)
    except ValueError as error:
        if row != "direct copy":
            raise
        print(f"{row} does not apply: {error}")
        return None
    if isinstance(result, peft_cast.TranslationResult):
        print(result, flush=True)
    result.save_pretrained(str(partial))
    partial.rename(folder)
    shutil.rmtree(run, ignore_errors=True)
    if isinstance(result, peft_cast.TranslationResult):
        setting.note_run(result, f"{folder.parent.name}_{folder.name}")
    del result
    gc.collect()
    return folder


def common(args, seed: int, times: int = 1) -> dict:
    """What a translation and a distillation from scratch have in common; of `times` as many texts twice as many a
    step.
    """
    text, refinement = setting.written(args.pair, args.task, args.modules, seed, times), dict(REFINEMENT[args.task])
    if times > 1:
        refinement["batch_size"] = 2 * refinement.get("batch_size", 8)
        refinement["steps"] = refinement["steps"] * times // 2
    cache = setting.OUTPUT / "cache"
    return {"text": text, "fit_text": setting.c4_documents()[0], "cache_dir": cache, "seed": seed, **refinement}


TIMES = 10


# Everything else is the default of `translate` and `distill_lora`.
SHORT = {"steps": 100, "batch_size": 12}  # texts of short answers are short
REFINEMENT = {"gsm8k": {"steps": 120}, "agnews": SHORT, "kinds": SHORT, "definitions": SHORT}


# What makes a row: of the source, its adapter and the target, the command's arguments, a seed, and a folder that a
# killed run goes on from.


def translated(source, adapter, target, args, seed: int, run: Path, options: dict | None = None):
    options = options or common(args, seed)
    return peft_cast.translate(source, adapter, target, output_dir=run, resume_from_checkpoint=True, **options)


def templated(source, adapter, target, args, seed: int, run: Path):
    """With as many answers to snippets of C4 in the prompts' template, for tasks that may be asked about any text."""
    options = common(args, seed)
    options["text"] += setting.written(args.pair, args.task, args.modules, seed, template=True)
    return translated(source, adapter, target, args, seed, run, options)


def longer(source, adapter, target, args, seed: int, run: Path):
    """With ten times as many texts and readings of them."""
    return translated(source, adapter, target, args, seed, run, common(args, seed, TIMES))


def own_words_longer(source, adapter, target, args, seed: int, run: Path):
    return own_words(source, adapter, target, args, seed, run, "CAST, ten times the text", TIMES)


def own_words(source, adapter, target, args, seed: int, run: Path, before: str = "CAST", times: int = 1):
    """The translation taken further on what it answers itself to the prompts of its text."""
    start = make(before, seed, *setting.PAIRS[args.pair], args)
    options = common(args, seed, times)
    prompts = tuple(dict.fromkeys(sample.target_prompt for sample in options["text"]))
    new_tokens = setting.NEW_TOKENS[args.task]
    text = peft_cast.SelfWritten(
        prompts=prompts, more_prompts=0, max_new_tokens=new_tokens, batch_size=setting.TOGETHER, on_policy=True
    )
    more = {"start": start, "text": text, "steps": 40 if times == 1 else 200, "learning_rate": 0.1}
    return translated(source, adapter, target, args, seed, run, {**options, **more})


def closed_form(source, adapter, target, args, seed: int, run: Path):
    texts = setting.c4_documents()[0]
    return peft_cast.translate(source, adapter, target, text=texts, fit_text=texts, steps=0, seed=seed)


def distilled(source, adapter, target, args, seed: int, run: Path):
    return baselines.distill_lora(source, adapter, target, **common(args, seed))


def crossed(source, adapter, target, args, seed: int, run: Path):
    return baselines.cross_lora(source, adapter, target)


def copied(source, adapter, target, args, seed: int, run: Path):
    return baselines.direct_copy(source, adapter, target)


ROWS: dict[str, Callable] = {
    "direct copy": copied,
    "Cross-LoRA": crossed,
    "CAST closed form": closed_form,
    "distilled from scratch": distilled,
    "CAST": translated,
    "CAST and own words": own_words,
    "CAST, C4 in the template too": templated,
    "CAST, ten times the text": longer,
    "CAST and own words, ten times the text": own_words_longer,
}
# Not the one that is for some tasks only, nor those that take a GPU.
DEFAULT = [row for row, made in ROWS.items() if made not in (templated, longer, own_words_longer)]
HEADLINE = ("CAST", "CAST and own words", "CAST, C4 in the template too")  # made with every seed


if __name__ == "__main__":
    main()
