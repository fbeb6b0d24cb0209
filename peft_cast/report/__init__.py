"""The report of a translation: what it did, how far it went, and what to do when that is not far enough."""

from .gather import gather_report
from .page import write_report


__all__ = ["gather_report", "write_report"]
