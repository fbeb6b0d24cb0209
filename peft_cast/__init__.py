"""Translate LoRA adapters from one language model to another. Importing the package registers CAST with PEFT."""

from . import baselines
from .evaluation import AnswerLikelihood, Classification, Evaluation, Generation, HarnessTask, evaluate
from .result import TranslationResult
from .text import Corpus, Mixture, SelfWritten
from .translate import translate
from .tuner import CastConfig, CastLayer, CastModel, KernelSpec, Linear, Rows


__version__ = "0.1.0"

__all__ = [
    "AnswerLikelihood",
    "CastConfig",
    "CastLayer",
    "CastModel",
    "Classification",
    "Corpus",
    "Evaluation",
    "Generation",
    "HarnessTask",
    "KernelSpec",
    "Linear",
    "Mixture",
    "Rows",
    "SelfWritten",
    "TranslationResult",
    "baselines",
    "evaluate",
    "translate",
]
