"""How results are judged: tasks, drift, and the comparison of adapters."""

from . import baselines
from .drift import drift
from .evaluate import evaluate
from .gather import gather_report
from .harness import HarnessTask
from .probe import Kind, Probe, probe
from .tasks import AnswerLikelihood, Classification, Generation, Scores, Task
