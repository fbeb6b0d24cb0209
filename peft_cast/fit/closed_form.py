"""Closed-form projections: `P_in` from activations, `P_out` from output gradients, in one pass of text.

An input projection should map what the target module sees to what the source module sees at the same place of the
same text: `P_in x_T ≈ x_S`. What an output projection must carry over is the *effect* of a delta. If `g_S` and `g_T`
are the gradients of the models' losses with respect to the module outputs, a source delta d and its image `P_out d`
change the loss alike, to first order, when `P_outᵀ g_T = g_S`. Both are ridge regressions on second moments.

With factored projections only `A P_in` and `P_out B` matter. Ridge regression is linear in its outputs, so they are
fitted directly (r outputs instead of in_S or out_S), with the same result at a fraction of the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers import PreTrainedModel

from ..align import (
    AlignedPair,
    ModuleMap,
    SharedVocabulary,
    collate_pairs,
    layer_pairs,
    layer_path,
    side_of,
    split_place,
)
from ..models import Captured, capture, free_memory, layer_outputs, next_token_loss, shared_head
from ..source import LoraKernel
from ..utils import distributed
from .maps import ClosedForm, KernelFit, Map, PlaceMaps
from .moments import HELD_OUT, Moments, RidgeFit


PASS_TOKENS = 2048  # in one process
# Of a target place's weights, the share that each of a bridge's maps on it may take: a fifth for both.
ROOM = 0.1
LEAST_RANK = 16  # of such a map


Goals: TypeAlias = Callable[[str], tuple[int, int]]  # source place → how many numbers of it are explained, in and out


class _Regressions:
    """Moments for all kernels of a model pair, created at the first batch, when the shared inputs are known.

    Without kernels the maps themselves are fitted: every `A` and `B` is the identity.
    """

    def __init__(self, kernels: Mapping[str, LoraKernel] | None, module_map: ModuleMap) -> None:
        self.kernels, self.module_map = kernels, module_map
        self.sources = list(dict.fromkeys(s for names in module_map.kernels.values() for s in names))
        self.input_groups: list[list[str]] = []  # target places that read the same tensor: q, k, v; gate, up
        self.columns: list[list[str]] = []  # for each group the source places whose inputs it explains
        self.same_input: dict[str, str] = {}  # source place → the one that stands for it in `columns`
        self.inputs: list[Moments] = []
        self.outputs: dict[str, Moments] = {}
        self.widths: dict[str, tuple[int, int]] = {}

    def _start(self, source: Captured, target: Captured, seen: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.widths = {name: (x.shape[1], g.shape[1]) for name, (x, g) in seen.items()}
        first: dict[int, str] = {}
        for name in seen:
            # Kernels differ where inputs do not; without them one map serves q, k and v.
            pointer = id(source.input(name).untyped_storage())
            self.same_input[name] = name if self.kernels is not None else first.setdefault(pointer, name)
        groups: dict[int, list[str]] = {}
        for name in self.module_map.kernels:
            groups.setdefault(id(target.input(name).untyped_storage()), []).append(name)
        self.input_groups = list(groups.values())
        for names in self.input_groups:
            columns = [self.same_input[s] for name in names for s in self.module_map.kernels[name]]
            self.columns.append(list(dict.fromkeys(columns)))
            x = target.input(names[0])
            self.inputs.append(Moments(x.shape[-1], sum(self.widths[s][0] for s in self.columns[-1]), x.device))
        for name, sources in self.module_map.kernels.items():
            g = target.gradient(name)
            self.outputs[name] = Moments(g.shape[-1], sum(self.widths[s][1] for s in sources), g.device)

    def _seen(self, source: Captured, name: str, at: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """Kernel inputs A x_S (n, r) and kernel gradients Bᵀ g_S (n, r)."""
        x, g = source.input(name)[at].float(), source.gradient(name)[at].float()
        return (x, g) if self.kernels is None else (x @ self.kernels[name].A.T, g @ self.kernels[name].B)

    def update(
        self,
        source: Captured,
        target: Captured,
        at_source: tuple,
        at_target: tuple,
        held_out: bool,
        elsewhere: int = 0,
    ) -> None:
        seen = {name: self._seen(source, name, at_source) for name in self.sources}
        if not self.inputs:
            self._start(source, target, seen)
        for names, columns, moments in zip(self.input_groups, self.columns, self.inputs):
            y = torch.cat([seen[s][0] for s in columns], dim=1)
            moments.update(target.input(names[0])[at_target], y, held_out, elsewhere)
        for name, moments in self.outputs.items():
            y = torch.cat([seen[s][1] for s in self.module_map.kernels[name]], dim=1)
            moments.update(target.gradient(name)[at_target], y, held_out, elsewhere)

    def solve(self, ridge: float | None, weights: Callable[[str], int]) -> dict[str, list]:
        """The fits of every target place; `weights` is how many numbers a place has, which bounds a bridge's maps."""
        into: dict[tuple[str, str], tuple[Map, float]] = {}
        for names, columns, moments in zip(self.input_groups, self.columns, self.inputs):
            room = sum(map(weights, names)) // len(columns)
            guesses = [self._guess(s, 0, moments) for s in columns]
            found = dict(
                zip(columns, self._solved(moments, [self.widths[s][0] for s in columns], ridge, guesses, room))
            )
            for name in names:
                into.update({(name, s): found[self.same_input[s]] for s in self.module_map.kernels[name]})
        fits: dict[str, list] = {}
        kind = PlaceMaps if self.kernels is None else KernelFit
        for name, moments in self.outputs.items():
            sources = self.module_map.kernels[name]
            blocks, room = [self.widths[s][1] for s in sources], weights(name) // len(sources)
            guesses = [self._guess(s, 1, moments) for s in sources]
            # Gradients are noisy and heavy-tailed, activations are not: their strengths differ by orders of magnitude.
            solved = self._solved(moments, blocks, ridge, guesses, room, start=1.0)
            fits[name] = [
                kind.of(s, into[name, s][0], found.T, into[name, s][1], r2, not near)
                for s, (found, r2), near in zip(sources, solved, moments.near)
            ]
        return fits

    def _guess(self, source: str, side: int, moments: Moments) -> torch.Tensor | None:
        """The map of a source place as if target and source were one model, if its shape allows."""
        if self.kernels is None:
            width = self.widths[source][side]
            return torch.eye(width) if width == len(moments.xx) else None
        kernel = self.kernels[source]
        map_if_same = kernel.B.T if side else kernel.A
        return map_if_same if map_if_same.shape[1] == len(moments.xx) else None

    def _solved(
        self,
        moments: Moments,
        blocks: list[int],
        ridge: float | None,
        guesses: list[torch.Tensor | None],
        room: int,
        start: float = 1e-2,
    ) -> list[tuple[Map, float]]:
        """For each block of outputs its map and R²; without kernels as two factors that fit into `room` numbers."""
        fit = moments.solve(blocks, ridge, start, guesses)
        if self.kernels is not None:
            return [(Map((weight.cpu(),)), r2) for weight, r2 in zip(fit.weight.split(blocks), fit.r2.tolist())]
        ranks = [max(LEAST_RANK, int(ROOM * room) // (size + len(moments.xx))) for size in blocks]
        return list(zip(*moments.cut(fit, blocks, ranks)))


TOO_FEW = "The closed form needs at least 2 texts, one to fit and one to check on: pass more text."


def fit_closed_form(
    source: PreTrainedModel,
    target: PreTrainedModel,
    pairs: Sequence[AlignedPair],
    vocabulary: SharedVocabulary,
    kernels: Mapping[str, LoraKernel] | None,
    module_map: ModuleMap,
    *,
    batch_size: int = 8,
    ridge: float | None = None,
    hidden: bool = True,
    memory: int | None = None,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> ClosedForm[Any]:
    """Fit every kernel's projections from one forward and one backward pass per model.

    If what is kept of all target layers does not fit into `memory`, the text is read once for each group of layers for
    which it does; the result is the same. Several processes share each batch, and each gets the fit of all.

    Every fifth batch (the last, if there are fewer) is held out: it chooses the ridge strength and gives the reported
    R².

    Args:
        source: The plain source model (no adapter active), frozen, in eval mode.
        target: The target model, likewise.
        pairs: Aligned texts.
        vocabulary: The shared vocabulary, on which both losses are taken.
        kernels: The LoRA of each adapted source place. `None` fits the maps themselves, as if A and B were identities.
        module_map: Where they land.
        batch_size (`int`): The most texts per pass; less of long ones, see `texts_per_pass`.
        ridge (`float`, *optional*): Fixed ridge strength relative to the mean eigenvalue, instead of the held-out
            choice.
        hidden (`bool`): Also fit the maps between hidden states that the hidden-state loss needs.
        memory (`int`, *optional*): Bytes for second moments and held-out positions; half of what is free on the
            target's device when not given.
        progress: Wrapper around the batches, e.g. `tqdm`.

    Raises:
        ValueError: If there are fewer than two texts.
    """
    sources = {s for names in module_map.kernels.values() for s in names}
    if kernels is not None:
        kernels = {
            name: LoraKernel(k.A.to(source.device), k.B.to(source.device), k.scaling)
            for name, k in kernels.items()
            if name in sources
        }
    if len(pairs) < 2:
        raise ValueError(TOO_FEW)
    longest = max(max(len(pair.source_ids), len(pair.target_ids)) for pair in pairs)
    batch_size = texts_per_pass(batch_size, len(pairs), longest, distributed.world_size())
    batches = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
    memory = distributed.all_reduce_min(free_memory(target.device) // 2) if memory is None else memory
    held_out = held_out_positions([sum(_positions(batch)) for batch in batches], distributed.world_size())
    # Of kernels a few numbers are explained, of a bridge's maps all of the source's.
    goals = partial(place_widths, source) if kernels is None else lambda name: (len(kernels[name].A),) * 2
    groups = layer_groups(module_map, target, memory, held_out, goals)
    passes = batches * len(groups)
    work = iter(progress(passes) if progress else passes)
    found: dict[str, list] = {}
    hidden_fits: dict[str, RidgeFit] = {}
    for group in groups:
        fits, states = _fit_group(source, target, work, len(batches), vocabulary, kernels, group, hidden, ridge)
        found |= fits
        hidden_fits |= states
    for _ in work:  # the progress bar ends when the iterator does
        pass
    fit = ClosedForm(
        kernels=found,
        hidden_maps={path: fit.weight.cpu() for path, fit in hidden_fits.items()},
        hidden_r2={path: float(fit.r2[0]) for path, fit in hidden_fits.items()},
        positions=sum(_positions(pairs)),
    )
    return distributed.broadcast(fit) if kernels is not None else fit  # a bridge's maps are as large as the models


def _positions(pairs: Sequence[AlignedPair]) -> list[int]:
    return [len(pair.target_positions) for pair in pairs]


def texts_per_pass(batch_size: int, texts: int, longest: int, processes: int) -> int:
    """How many texts, of up to `longest` tokens, all processes read in one pass: at most `batch_size` and half of the
    texts.

    All activations of a pass are kept for its gradients, and passes of more than `PASS_TOKENS` are no faster.
    """
    return min(batch_size, -(-texts // 2), processes * max(1, PASS_TOKENS // longest))


def held_out_batches(batches: int) -> set[int]:
    """Numbers of the batches that are held out, or the regression on noisy gradients is trusted far too much."""
    return set(range(4, batches, 5)) or {batches - 1}


def held_out_positions(batches: Sequence[int], processes: int) -> int:
    """How many positions each process holds out of `batches`, of so many positions together."""
    return min(HELD_OUT, sum(batches[number] for number in held_out_batches(len(batches)))) // processes


def layer_groups(
    module_map: ModuleMap, target: PreTrainedModel, memory: int, held_out: int, goals: Goals | None = None
) -> list[ModuleMap]:
    """The module map in parts of consecutive target layers, each as large as what is kept of it fits into `memory`
    bytes.

    Args:
        goals: As in `moments_size`.
    """
    groups: list[dict[str, list[str]]] = []
    used, last = 0, None
    for name, sources in module_map.kernels.items():
        explained = [sum(widths) for widths in zip(*map(goals, sources))] if goals else (0, 0)
        layer, size = layer_path(name), moments_size(target, name, held_out, explained)
        if not groups or (used + size > memory and layer != last):
            groups.append({})
            used = 0
        used += size
        groups[-1][name] = sources
        last = layer
    return [replace(module_map, kernels=group) for group in groups]


def moments_size(target: PreTrainedModel, place: str, held_out: int, explained: Sequence[int] = (0, 0)) -> int:
    """Bytes kept of one target place: the float32 squares of its widths, and its `held_out` positions as they are;
    likewise of what its inputs and its gradients explain, so many numbers each.

    Inputs that modules share are counted for each of them: rather too much than too little.
    """
    sides = zip(place_widths(target, place), explained)
    return sum(4 * width * (width + y) + held_out * (target.dtype.itemsize * width + 4 * y) for width, y in sides)


def place_widths(model: PreTrainedModel, place: str) -> tuple[int, int]:
    """Inputs and outputs of the module that a place is in."""
    module = model.get_submodule(split_place(place)[0])
    return _get_in_out_features(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)


def _fit_group(
    source: PreTrainedModel,
    target: PreTrainedModel,
    work: Iterator[Sequence[AlignedPair]],
    batches: int,
    vocabulary: SharedVocabulary,
    kernels: Mapping[str, LoraKernel] | None,
    group: ModuleMap,
    hidden: bool,
    ridge: float | None,
) -> tuple[dict[str, list], dict[str, RidgeFit]]:
    """The kernels' fits and the maps between hidden states of one group of layers, from the next `batches` of the
    work.
    """
    regressions = _Regressions(kernels, group)
    hidden_moments: dict[str, Moments] = {}
    pairs_of_layers = layer_pairs(group) if hidden else {}
    kept_out = held_out_batches(batches)
    elsewhere = 0
    with (
        shared_head(source, vocabulary.source_ids),
        shared_head(target, vocabulary.target_ids),
        capture(source, {s for names in group.kernels.values() for s in names}) as at_source,
        capture(target, group.kernels) as at_target,
        layer_outputs(source, set(pairs_of_layers.values())) as source_states,
        layer_outputs(target, pairs_of_layers) as target_states,
    ):
        for number, chunk in enumerate(islice(work, batches)):
            own = distributed.split(chunk)
            batch = collate_pairs(own or chunk[:1])
            counted = slice(None) if own else slice(0)  # a last batch may be smaller than there are processes
            held_out = number in kept_out
            parts = [sum(_positions(distributed.split(chunk, of))) for of in range(distributed.world_size())]
            elsewhere += sum(parts[: distributed.rank()]) if held_out else 0
            index = {}
            for side, model, ids in (
                ("source", source, vocabulary.source_ids),
                ("target", target, vocabulary.target_ids),
            ):
                inputs, rows, positions = side_of(batch, side, model.device)
                _pass(model, inputs, ids)
                index[side] = (rows[counted], positions[counted])
            regressions.update(at_source, at_target, index["source"], index["target"], held_out, elsewhere)
            for path, source_path in pairs_of_layers.items():
                x = with_bias(source_states[source_path].detach()[index["source"]].float())
                y = target_states[path].detach()[index["target"]]
                if path not in hidden_moments:
                    hidden_moments[path] = Moments(x.shape[1], y.shape[1], y.device)
                hidden_moments[path].update(x.to(y.device), y, held_out, elsewhere)
            elsewhere += sum(parts[distributed.rank() + 1 :]) if held_out else 0
            for seen in (at_source, at_target, source_states, target_states):
                seen.clear()
    states = {path: moments.solve([moments.yy.shape[0]], ridge) for path, moments in hidden_moments.items()}
    return regressions.solve(ridge, lambda name: math.prod(place_widths(target, name))), states


def _pass(model: PreTrainedModel, inputs: dict, token_ids: torch.Tensor) -> None:
    """Forward and backward on the next-token loss over the shared vocabulary."""
    place = torch.full((model.get_input_embeddings().weight.shape[0],), -100, device=model.device)
    place[token_ids.to(model.device)] = torch.arange(len(token_ids), device=model.device)
    labels = place[inputs["input_ids"]].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.enable_grad():
        next_token_loss(model(**inputs).logits, labels).backward()


def with_bias(x: torch.Tensor) -> torch.Tensor:
    """Append a 1 to every row: (n, d) → (n, d + 1)."""
    return nn.functional.pad(x, (0, 1), value=1.0)
