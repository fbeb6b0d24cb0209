"""How results are shared: what a saved folder holds, its licences, its model card, and the upload to the Hub."""

from .artifacts import (
    BRIDGE_CONFIG_NAME,
    BRIDGE_WEIGHTS_NAME,
    METRICS_NAME,
    REPORT_NAME,
    Artifact,
    Origin,
    read_artifact,
    replacing_folder,
    write_metrics,
)
from .cards import make_card, write_card
from .licences import Licence, Licences, read_licences
from .publish import Publishable, add_card, push, push_saved


__all__ = [
    "BRIDGE_CONFIG_NAME",
    "BRIDGE_WEIGHTS_NAME",
    "METRICS_NAME",
    "REPORT_NAME",
    "Artifact",
    "Licence",
    "Licences",
    "Origin",
    "Publishable",
    "add_card",
    "make_card",
    "push",
    "push_saved",
    "read_artifact",
    "read_licences",
    "replacing_folder",
    "write_card",
    "write_metrics",
]
