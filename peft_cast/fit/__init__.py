"""How projections are fitted (closed form) and trained (refinement)."""

from .batches import collate_pairs
from .closed_form import ClosedForm, KernelFit, fit_closed_form
from .refine import CastTrainer, TeacherSettings, distance_to_teacher


__all__ = [
    "CastTrainer",
    "ClosedForm",
    "KernelFit",
    "TeacherSettings",
    "collate_pairs",
    "distance_to_teacher",
    "fit_closed_form",
]
