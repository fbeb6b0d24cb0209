"""The report of a translation: what it did, how far it went, and what to do when that is not far enough."""

from .page import write_report
from .redact import redact, redact_pieces
