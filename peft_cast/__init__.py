"""Translate LoRA adapters from one language model to another. Importing the package registers CAST with PEFT."""

from .result import TranslationResult
from .text import Corpus, Mixture, SelfWritten
from .translate import translate
from .tuner import CastConfig, CastLayer, CastModel, KernelSpec, Linear


__version__ = "0.1.0"

__all__ = [
    "CastConfig",
    "CastLayer",
    "CastModel",
    "Corpus",
    "KernelSpec",
    "Linear",
    "Mixture",
    "SelfWritten",
    "TranslationResult",
    "translate",
]
