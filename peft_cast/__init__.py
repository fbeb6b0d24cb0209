"""Translate LoRA adapters from one language model to another. Importing the package registers CAST with PEFT."""

from . import baselines
from .bridge import Bridge, fit_bridge
from .evaluation import AnswerLikelihood, Classification, Evaluation, Generation, HarnessTask, evaluate
from .fold import FoldedLora, to_lora
from .planning import Plan, plan
from .report import write_report
from .result import TranslationResult
from .run import NotSavedError
from .sharing import push
from .text import Corpus, Mixture, SelfWritten
from .translate import translate
from .tuner import CastConfig, CastLayer, CastModel, KernelSpec, Linear, Rows


__version__ = "0.1.0"

__all__ = [
    "AnswerLikelihood",
    "Bridge",
    "CastConfig",
    "CastLayer",
    "CastModel",
    "Classification",
    "Corpus",
    "Evaluation",
    "FoldedLora",
    "Generation",
    "HarnessTask",
    "KernelSpec",
    "Linear",
    "Mixture",
    "Plan",
    "NotSavedError",
    "Rows",
    "SelfWritten",
    "TranslationResult",
    "baselines",
    "evaluate",
    "fit_bridge",
    "plan",
    "push",
    "to_lora",
    "translate",
    "write_report",
]
