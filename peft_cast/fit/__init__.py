"""How projections are fitted (closed form) and trained (refinement)."""

from .batches import TrainingTexts, collate_pairs
from .closed_form import ClosedForm, KernelFit, fit_closed_form
from .memory import TeacherMemory, fingerprint
from .refine import CastTrainer, Teacher, TeacherSettings, distance_to_teacher, imitate
from .saved import load_closed_form, save_closed_form


__all__ = [
    "CastTrainer",
    "ClosedForm",
    "KernelFit",
    "Teacher",
    "TeacherMemory",
    "TeacherSettings",
    "TrainingTexts",
    "collate_pairs",
    "distance_to_teacher",
    "fingerprint",
    "fit_closed_form",
    "imitate",
    "load_closed_form",
    "save_closed_form",
]
