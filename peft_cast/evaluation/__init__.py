"""How results are judged: tasks, drift, and the comparison of adapters."""

from .drift import drift
from .evaluate import evaluate
from .harness import HarnessTask
from .rows import Evaluation, Measurement, Row
from .tasks import AnswerLikelihood, Classification, Generation, Scores, Task


__all__ = [
    "AnswerLikelihood",
    "Classification",
    "Evaluation",
    "Generation",
    "HarnessTask",
    "Measurement",
    "Row",
    "Scores",
    "Task",
    "drift",
    "evaluate",
]
