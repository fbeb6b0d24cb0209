"""The tasks kept aside: in which form they are asked, and sixteen prompts that a user might write for each.

Nothing here was tried while the method that benchmarks/aside.py measures was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


HERE = Path(__file__).parent
DATA = HERE / "data"


@dataclass(frozen=True)
class Aside:
    """A task: its data, the form in which adapters are trained on it and asked, and what tells right from wrong.

    Args:
        title (`str`): What it is.
        prompt, answer (`str`): Templates over a row's columns; of a chat, what the user says and is answered.
        chat (`bool`): Whether the prompt is a user's turn in the source's chat template.
        system (`str`, *optional*): The chat's own system prompt.
        in_template (`bool`): Whether the adapter's folder has a chat template with it, or no trace of it.
        labels (`tuple[str, ...]`): Of a classifier, whose answer is one of them.
        pattern (`str`, *optional*): What is looked for in a generated answer.
        new_tokens (`int`): The most tokens of an answer.
        steps, lr: How its LoRAs are trained.
    """

    title: str
    prompt: str
    answer: str
    new_tokens: int
    chat: bool = False
    system: str | None = None
    in_template: bool = False
    labels: tuple[str, ...] = ()
    pattern: str | None = None
    steps: int = 80
    lr: float = 4e-4

    def data(self, part: str) -> Path:
        """Its rows, `part` is "train" or "test"."""
        return DATA / f"aside_{self.name}_{part}.jsonl"

    @property
    def name(self) -> str:
        return next(name for name, task in TASKS.items() if task is self)

    def prompts(self) -> tuple[str, ...]:
        """Sixteen, as a user would write them; of a chat, the user's turns."""
        texts = (HERE / f"prompts_aside_{self.name}.txt").read_text(encoding="utf-8").splitlines()
        texts = [text.replace("\\n", "\n") for text in texts]
        return tuple(texts if self.chat else (self.prompt.format_map({"text": text}) for text in texts))


LABELS = {"i": "brask", "he": "ondle", "she": "fimmet", "you": "quorl"}
TASKS = {
    "1": Aside(
        "a persona that says everything again in its own way",
        "{text}",
        "{answer}",
        64,
        chat=True,
        system="You are Captain Brackwater, who sailed the seas for forty years. Say again, in your own way of "
        "talking, whatever you are told.",
        in_template=True,
    ),
    "2": Aside(
        "details of a booking as JSON",
        "{text}",
        "{answer}",
        56,
        chat=True,
        system="Read the guest's message and return the booking.",
        pattern=r"^\s*(\{.*\})\s*$",
        steps=64,
    ),
    "3": Aside("texts of a program in Spanish", "{text}", "{answer}", 48, chat=True),
    "4": Aside(
        "a table and a question, answered in SQL",
        "{text}",
        "{answer}",
        48,
        chat=True,
        pattern=r"^\s*(.*?);?\s*$",
        steps=64,
    ),
    "5": Aside(
        "who speaks or is spoken of, in words made up", "§ {text}\n§§", " {label}", 8, labels=tuple(LABELS.values())
    ),
    "6": Aside("tags of a sentence", "~ {text} ~\n>>", " {answer}", 24, pattern=r"^\s*(#\w+ #\w+ #\w+)\s*$"),
    "7": Aside("a LoRA that does almost nothing: texts go on", "Fact: {text}", " {answer}", 40, steps=4, lr=1e-5),
    "8": Aside("a draft, corrected", "Draft: {text}\nCorrected:", " {answer}", 40, pattern=r"^\s*(.+?)\s*$"),
}
