"""What the text takes that the models write."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..align import layer_paths
from ..text import Effort
from .fake import Cost


def writing_cost(effort: Effort, source: PreTrainedModel, target: PreTrainedModel) -> Cost:
    """Cost of what the models read and write, by the sizes of their layers' matrices.

    Args:
        effort (`Effort`): How many tokens and passes.
        source, target: Skeletons without adapters.
    """
    flops, products, peak = 0, 0, 0
    for tokens, passes, model in (
        (effort.source, effort.source_passes, source),
        (effort.target, effort.target_passes, target),
    ):
        head = model.get_output_embeddings().weight
        paths = layer_paths(model)
        matrices = [p.numel() for path in paths for p in model.get_submodule(path).parameters() if p.ndim == 2]
        flops += 2 * int(tokens * sum(matrices) + passes * effort.rows * head.numel())
        products += int(passes) * len(matrices)
        # A batch's keys and values, at most as wide as the hidden states, and the logits that are drawn from.
        kept = 4 * effort.length * head.shape[1] * len(paths) + 8 * head.shape[0]
        peak = max(peak, effort.rows * kept)
    return Cost(flops, products, peak)
