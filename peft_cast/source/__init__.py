"""The adapted source: loading any PEFT adapter on its model, and reading it as plain low-rank kernels."""

from .kernels import SourceAdapter
from .loading import adapted_source, load_source


__all__ = ["SourceAdapter", "adapted_source", "load_source"]
