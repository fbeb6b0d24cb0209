"""How projections are fitted (closed form) and trained (refinement)."""

from .batches import TrainingTexts, collate_pairs
from .closed_form import ClosedForm, KernelFit, fit_closed_form
from .refine import CastTrainer, Teacher, TeacherSettings, distance_to_teacher, imitate


__all__ = [
    "CastTrainer",
    "ClosedForm",
    "KernelFit",
    "Teacher",
    "TeacherSettings",
    "TrainingTexts",
    "collate_pairs",
    "distance_to_teacher",
    "fit_closed_form",
    "imitate",
]
