"""Which of two models is believed about an adapter's task, from the sixteen prompts alone (`teacher="auto"`).

    .venv/bin/python benchmarks/stronger.py qwen-0.5b:agnews    # some; all without arguments

For SmolLM2's LoRAs and a target each: what either model minds of the other's answers, the teacher that follows, and,
for the reader, how often each of the two answers is right on labelled problems that nothing else here reads. Writes
docs/figures/stronger.json after each pair and task and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import re

import setting
from setting import score

from peft_cast.models import continuations
from peft_cast.refine.stronger import PROMPTS, exchange
from peft_cast.source.pair import open_pair
from peft_cast.text import SelfWritten, TextSample, shown_prompts, write_texts
from peft_cast.utils.environment import environment


RESULTS = setting.FIGURES / "stronger.json"
TARGETS = ("gemma3-270m", "qwen-0.5b")
NEW_TOKENS = {"gsm8k": 192, "agnews": 8}
LABELLED = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[f"{t}:{task}" for task in NEW_TOKENS for t in TARGETS])
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"cases": {}}
    for case in parser.parse_args().cases:
        if case not in results["cases"]:
            results["cases"][case] = judged(*case.split(":"))
            results["environment"], results["seed"] = environment(), 0
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(case, json.dumps(results["cases"][case]), flush=True)


def judged(target: str, task: str) -> dict:
    spec = SelfWritten(prompts=setting.prompts(task), max_new_tokens=NEW_TOKENS[task], batch_size=48)
    rows = [json.loads(line) for line in labelled(task).open(encoding="utf-8")][-LABELLED:]
    asked = [score.PROMPT.format(**row) if task == "gsm8k" else setting.news_prompt(row) for row in rows]
    with open_pair(setting.SMOLLM2.folder(), setting.SMOLLM2.adapter(task), setting.UPGRADES[target].folder()) as pair:
        answers = write_texts(pair.adapted, *pair.tokenizers, spec, limit=PROMPTS + 4, target=pair.target)
        found = exchange(pair, answers, spec)
        of_target = [TextSample("", prompt, prompt) for prompt in asked]
        longest = spec.max_new_tokens
        examples = shown_prompts(found.answers, pair.tokenizers[1], 0, longest, of_target, spec.batch_size)
        shown = {one.target_prompt: one for one in examples}
        prompts = asked, [shown[prompt].source_prompt for prompt in asked]
        right = {
            name: share_right(task, rows, continuations(model, tokenizer, some, spec.max_new_tokens))
            for name, model, tokenizer, some in zip(
                ("adapted source", "target, shown"), (pair.adapted, pair.target), pair.tokenizers, prompts
            )
        }
    return {"minds": vars(found.minds), "teacher": found.minds.teacher, "right": right, "labelled": len(rows)}


def labelled(task: str):
    return setting.data_folder() / ("gsm8k_train.jsonl" if task == "gsm8k" else "ag_news_train.jsonl")


def share_right(task: str, rows: list[dict], answers: list[str]) -> float:
    if task == "agnews":
        return sum(a.strip().startswith(row["label"]) for a, row in zip(answers, rows)) / len(rows)
    found = [(re.findall(score.NUMBER, a) or re.findall(r"-?\d[\d,.]*", a) or [""])[-1] for a in answers]
    gold = [re.findall(score.NUMBER, row["answer"])[-1] for row in rows]
    return sum(a.replace(",", "").rstrip(".") == g.replace(",", "") for a, g in zip(found, gold)) / len(rows)


if __name__ == "__main__":
    main()
