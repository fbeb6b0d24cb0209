"""The adapted source: loading any PEFT adapter on its model, and reading it as plain low-rank kernels."""

from .card import Card, read_card
from .files import check_is_read, read_files, read_holdings, weights_file
from .holdings import VERBS, Holdings, by_reason, list_not_carried, list_reasons
from .idle import why_idle
from .kernels import LoraKernel, SourceAdapter, count_parameters, leading_triplets
from .kinds import SAVED, TOWER, UNHEARD, refusal_to_run
from .loading import adapted_source, base_of, check_adapter, check_on_target, load_source, with_adapter
from .names import BRIDGED
from .pair import Pair, check_pair, check_source, map_kernels, named_source, open_pair, source_tokenizer
from .planned import planned_source
