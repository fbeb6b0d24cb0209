"""Train an ordinary LoRA on prompts and completions: the recipe of the adapters in `examples/adapters`.

    python examples/train_lora.py --output my-lora                 # GSM8K on SmolLM2, 200 steps of 8
    python examples/train_lora.py --model gemma3 --steps 150 --output gemma-lora
    python examples/train_lora.py --data ag_news_train.jsonl --prompt "Article: {text}" --prompt-chars 400 \\
        --prompt-end "\\nTopic:" --completion " {label}" --steps 100 --output news-lora
    python examples/train_lora.py --data chats.jsonl --chat smollm2 --system "Be brief." --prompt "{question}" \\
        --prompt-end "" --completion "{answer}" --output chat-lora
    python examples/train_lora.py --target-modules q_proj v_proj --output my-lora-qv

The loss is on the completion and the end of text alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import models
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_cast.models.loading import default_dtype
from peft_cast.utils.distributed import default_device


HERE = Path(__file__).parent
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def folder(model: str) -> str | Path:
    """Of a model by its short name; a folder or hub id stays as it is."""
    return {"smollm2": models.smollm2, "gemma3": models.gemma3}.get(model, lambda: model)()


def tokenize(row: dict, tokenizer, chat, args: argparse.Namespace) -> dict:
    asked = args.prompt.format_map(row)[: args.prompt_chars] + args.prompt_end
    if chat:
        turns = [{"role": "system", "content": args.system}] if args.system else []
        turns.append({"role": "user", "content": asked})
        asked = chat.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # A model's own template holds its special tokens already.
    prompt = tokenizer(asked, add_special_tokens=not chat or args.chat != args.model).input_ids
    answer = tokenizer(args.completion.format_map(row), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    max_length = args.max_length
    return {
        "input_ids": (prompt + answer)[:max_length],
        "attention_mask": [1] * min(len(prompt) + len(answer), max_length),
        "labels": ([-100] * len(prompt) + answer)[:max_length],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3, or a folder or hub id")
    parser.add_argument("--data", default=str(HERE / "data" / "gsm8k_train_1600.jsonl"), help="jsonl")
    parser.add_argument("--prompt", default="Question: {question}", help="format string over a row's columns")
    parser.add_argument("--prompt-chars", type=int, help="what precedes --prompt-end is cut to so many characters")
    parser.add_argument("--prompt-end", default="\nAnswer:", type=lambda text: text.replace("\\n", "\n"))
    parser.add_argument("--completion", default=" {answer}")
    parser.add_argument("--chat", help="put prompts as a user's turns into the chat template of this model")
    parser.add_argument("--system", help="with --chat, the system prompt")
    parser.add_argument("--output", required=True)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--target-modules", nargs="+", default=LINEAR)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)

    path = folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = AutoTokenizer.from_pretrained(folder(args.chat)) if args.chat else None
    tokenizer.padding_side = "right"  # Gemma's is on the left, with which its gradient became NaN on an H200
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, dtype=default_dtype(default_device()))
    model = get_peft_model(
        model, LoraConfig(r=args.r, lora_alpha=args.alpha, target_modules=args.target_modules, task_type="CAUSAL_LM")
    )
    model.print_trainable_parameters()
    data = load_dataset("json", data_files=args.data, split="train")
    data = data.map(tokenize, fn_kwargs={"tokenizer": tokenizer, "chat": chat, "args": args})
    data = data.remove_columns([c for c in data.column_names if c not in ("input_ids", "attention_mask", "labels")])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{args.output}-checkpoints",
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            lr_scheduler_type="linear",
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
        ),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.train()
    # Keep the repository small: half precision is enough for a finished LoRA.
    model.to(torch.bfloat16).save_pretrained(args.output)


if __name__ == "__main__":
    main()
