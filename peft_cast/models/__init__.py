"""Models: loading them, cutting their heads, spreading them, letting them write and judge, and giving them back."""

from transformers import AutoModelForCausalLM

from .adapters import (
    as_peft_reads,
    freeze_adapter,
    load_on_skeleton,
    unload_adapters,
    unloaded_on_error,
    without_advice,
)
from .capture import Captured, capture, layer_outputs, next_token_loss
from .generating import SampleTopK, continuations, padded
from .heads import contiguous_head, ends_in_head, logits_at, shared_head, states_at
from .likelihood import answer_nats, by_length, choice_nats, token_nats
from .loading import (
    as_skeleton,
    auto_class,
    check_loaded,
    check_model,
    check_own_weights,
    check_remote_code,
    check_unwrapped,
    default_dtype,
    fingerprint,
    free_memory,
    load_model,
    read_model_config,
    skeleton,
    skeleton_of,
)
from .positions import check_positions, check_prompts_fit, fitting, learned_positions
from .prefixes import Prefix, after_prefixes, keeps_prefixes, read_prefix
from .restoring import in_eval_mode, moved, seeded, untouched
from .sharding import is_sharded
from .tokenizers import adapter_tokenizer, beginning_of, load_tokenizer, render_chats
