"""Translate LoRA adapters from one language model to another. Importing the package registers CAST with PEFT."""

from importlib import import_module
from typing import TYPE_CHECKING

from .utils.importing import lazily, when_imported


if TYPE_CHECKING:
    from .evaluation import (
        AnswerLikelihood,
        Classification,
        Generation,
        HarnessTask,
        Probe,
        baselines,
        evaluate,
        probe,
    )
    from .fit import Bridge, fit_bridge
    from .options import Fit, Pairing, Projections, Run, Training
    from .planning import Plan, plan
    from .refine import NotSavedError
    from .results import Evaluation, FoldedLora, TranslationResult, push, to_lora, write_report
    from .text import Corpus, Mixture, SelfWritten, Survey
    from .translate import translate
    from .tuner import CastConfig, CastLayer, CastModel, KernelSpec, Linear, OutputRows

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
    "Fit",
    "FoldedLora",
    "Generation",
    "HarnessTask",
    "KernelSpec",
    "Linear",
    "Mixture",
    "NotSavedError",
    "OutputRows",
    "Pairing",
    "Plan",
    "Probe",
    "Projections",
    "Run",
    "SelfWritten",
    "Survey",
    "Training",
    "TranslationResult",
    "baselines",
    "evaluate",
    "fit_bridge",
    "plan",
    "probe",
    "push",
    "to_lora",
    "translate",
    "write_report",
]

lazily(__name__)
# PEFT takes seconds to import. CAST is registered as soon as PEFT is there: now, or when anything imports it.
when_imported("peft", lambda: import_module(".tuner", __name__))
