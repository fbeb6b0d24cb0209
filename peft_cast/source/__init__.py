"""The adapted source: loading any PEFT adapter on its model, and reading it as plain low-rank kernels."""

from .kernels import LoraKernel, SourceAdapter, count_parameters
from .loading import adapted_source, load_source
from .pair import Pair, open_pair
from .planned import planned_source
