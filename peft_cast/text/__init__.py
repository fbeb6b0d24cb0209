"""What is read as text: corpora, text the adapted source model writes itself, and mixtures."""

from .corpus import C4, Corpus, read_corpus
from .mixture import Mixture, check_text, default_text, is_written, read_text
from .samples import TextSample, align_samples
from .written import SelfWritten, write_answers, write_texts


__all__ = [
    "C4",
    "Corpus",
    "Mixture",
    "SelfWritten",
    "TextSample",
    "align_samples",
    "check_text",
    "default_text",
    "is_written",
    "read_corpus",
    "read_text",
    "write_answers",
    "write_texts",
]
