"""How projections are fitted (closed form) and trained (refinement)."""

from .batches import TrainingTexts, collate_pairs
from .checkpoints import checkpoints, last_checkpoint, read_state
from .closed_form import ClosedForm, KernelFit, fit_closed_form
from .imitate import distance_to_teacher, imitate
from .memory import TeacherMemory, fingerprint
from .out_of_memory import within_memory
from .refine import CastTrainer, Refinement, training_precision
from .saved import load_closed_form, save_closed_form
from .teacher import Teacher, TeacherSettings


__all__ = [
    "CastTrainer",
    "ClosedForm",
    "KernelFit",
    "Refinement",
    "Teacher",
    "TeacherMemory",
    "TeacherSettings",
    "TrainingTexts",
    "checkpoints",
    "collate_pairs",
    "distance_to_teacher",
    "fingerprint",
    "fit_closed_form",
    "imitate",
    "last_checkpoint",
    "read_state",
    "load_closed_form",
    "save_closed_form",
    "training_precision",
    "within_memory",
]
