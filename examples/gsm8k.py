"""GSM8K as the demo measures it: likelihood of the gold answers, and generated answers in GSM8K's format."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


ANSWER = re.compile(r"#### *(-?[\d.,]*\d)")


def load_problems(path: str | Path, count: int) -> list[dict[str, str]]:
    """The first problems of a jsonl file with `question` and `answer`."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(count), lines)]


def prompt_of(problem: dict[str, str]) -> str:
    return f"Question: {problem['question']}\nAnswer:"


@torch.no_grad()
def nats_per_character(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[dict[str, str]], batch_size: int = 8
) -> float:
    """−log p(gold answer | prompt) in nats, divided by the answers' characters. Lower is better."""
    nats = 0.0
    for batch in _batches(problems, batch_size):
        prompts = [tokenizer(prompt_of(p)).input_ids for p in batch]
        answers = [tokenizer(" " + p["answer"], add_special_tokens=False).input_ids for p in batch]
        # Left padding puts the answers side by side at the end, so the big head runs on them alone.
        width = max(len(p) + len(a) for p, a in zip(prompts, answers))
        keep = max(map(len, answers))
        ids, mask, labels = (torch.zeros(len(batch), n, dtype=torch.long) for n in (width, width, keep))
        labels -= 100
        for row, (prompt, answer) in enumerate(zip(prompts, answers)):
            ids[row, width - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
            mask[row, width - len(prompt) - len(answer) :] = 1
            labels[row, keep - len(answer) :] = torch.tensor(answer)
        logits = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(model.device),
            logits_to_keep=keep + 1,
            use_cache=False,
        ).logits[:, :-1]
        nats += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten().to(logits.device), reduction="sum"
            )
        )
    return nats / sum(len(p["answer"]) + 1 for p in problems)


@torch.no_grad()
def write_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[dict[str, str]], max_new_tokens: int
) -> list[str]:
    """Greedy answers, all problems in one batch."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    inputs = tokenizer([prompt_of(p) for p in problems], return_tensors="pt", padding=True).to(model.device)
    tokenizer.padding_side = side
    inputs.pop("token_type_ids", None)
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def format_share(answers: list[str]) -> float:
    """Share of answers that end GSM8K's way, with `#### number`."""
    return sum(bool(ANSWER.search(answer)) for answer in answers) / len(answers)


def correct_share(answers: list[str], problems: list[dict[str, str]]) -> float:
    """Share of answers whose number after `####` is the gold one."""
    gold = [ANSWER.search(p["answer"])[1].replace(",", "") for p in problems]
    found = [match[1].replace(",", "") if (match := ANSWER.search(a)) else None for a in answers]
    return sum(f == g for f, g in zip(found, gold)) / len(answers)


def _batches(problems: list[dict[str, str]], size: int) -> list[list[dict[str, str]]]:
    ordered = sorted(problems, key=lambda p: len(p["question"]) + len(p["answer"]))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
