"""Refinement: the projections are trained against the adapted source model."""

from .cache import TeacherCache, TopKLogProbs
from .distill import distill_lora
from .imitate import Imitation, imitate
from .losses import Logits, Predictions, TopKDivergence, kl_divergence, rows_at_once
from .on_policy import check_prompts, imitate_on_own_words
from .route import check_first_maps, first_maps
from .run import NotSavedError, RunFolder, check_folder, check_resumed, clear_run, described, open_run
from .shown import open_teacher, taught
from .strength import settle_strength
from .teacher import Teacher
from .trainer import training_precision
