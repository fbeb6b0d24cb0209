"""What is read as text: corpora, text the adapted source model writes itself, and mixtures."""

from .corpus import Corpus, read_corpus
from .mixture import Mixture, read_text
from .samples import TextSample
from .written import SelfWritten, write_texts


__all__ = ["Corpus", "Mixture", "SelfWritten", "TextSample", "read_corpus", "read_text", "write_texts"]
