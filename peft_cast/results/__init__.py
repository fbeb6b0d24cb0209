"""What a translation leaves behind: its result, report, card and folded LoRA, and how they are shared."""

from .artifacts import BRIDGE_CONFIG_NAME, BRIDGE_WEIGHTS_NAME, METRICS_NAME, REPORT_NAME, Artifact, read_artifact
from .beside import check_formats
from .cards import make_card
from .diagnosis import diagnose
from .fold import FORMATS, FoldedLora, fold_beside, to_lora
from .licenses import read_licenses
from .paired import Paired
from .publish import add_card, push, push_saved
from .report import write_report
from .result import TranslationResult
from .rows import BASE, Evaluation, Measurement, is_base
