"""Places: the projections of a decoder, whatever they are called and also where several are fused into one module.

A place is a linear module of a decoder layer, or rows of the output of one that computes several projections at once.
Its name is the module's, with the rows in brackets where it is a part: `"model.layers.3.self_attn.qkv_proj[0:3072]"`.
Its role says what it does. All that is known about architectures is in this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..tuner import OutputRows
from ..tuner.quantized import linear_size


# Names of the projections in the architectures we know; with the parent's where one name serves two (GPT-2).
ROLES = {
    "q": ("q_proj", "query", "q", "wq"),
    "k": ("k_proj", "key", "k", "wk"),
    "v": ("v_proj", "value", "v", "wv"),
    "o": ("o_proj", "attn.c_proj"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "fc1", "dense_h_to_4h", "c_fc", "fc_in"),
    "down": ("down_proj", "w2", "fc2", "dense_4h_to_h", "mlp.c_proj", "fc_out"),
}


_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
# These project the attention's output only if they stand beside queries: other blocks have modules of the same names.
OUTPUTS_BESIDE_QUERIES = ("out_proj", "dense", "c_proj", "wo")
FUSED_ATTENTION = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack")
FUSED_MLP = ("gate_up_proj",)
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
# Words in the names of unknown modules that decide between places of equal shape.
_HINTS = {
    **dict.fromkeys(("q", "query", "queries"), "q"),
    **dict.fromkeys(("k", "key", "keys"), "k"),
    **dict.fromkeys(("v", "value", "values"), "v"),
    **dict.fromkeys(("o", "out", "output"), "o"),
    "gate": "gate",
    "up": "up",
}


# In the names of what lies beside the decoder in models that see or hear, which no text passes through.
SENSES = re.compile(
    "vision|visual|image|audio|speech|multi_?modal|modality|mm_projector|connector|aligner|merger|q_?former|resampler|"
    "perceiver|vqmodel|language_projection"
)
_LAYER = re.compile(r"^(?P<stem>.*?)\.(?P<index>\d+)\.(?P<rest>.+)$")
_PART = re.compile(r"^(?P<module>.*)\[(?P<start>\d+):(?P<stop>\d+)(?:/(?P<stride>\d+))?\]$")


@dataclass(frozen=True)
class Place:
    """Where a kernel can sit.

    Args:
        name (`str`): The module's name, with the rows if it is a part of a fused module.
        layer (`int`): Number of its decoder layer.
        label (`str`): The name within the layer, `"self_attn.qkv_proj[0:3072]"`.
        role (`str`, *optional*): What it does, one of `ROLES`; `None` if that is unknown.
        found (`str`): What tells the role: `"name"` or `"shape"`.
        width (`int`): Outputs of the whole module; 0 if only the name is known.
    """

    name: str
    layer: int
    label: str
    role: str | None
    found: str
    width: int


def split_place(name: str) -> tuple[str, OutputRows | None]:
    """A place's module and rows: `"h.0.attn.c_attn[0:8]"` → `("h.0.attn.c_attn", OutputRows(0, 8))`."""
    match = _PART.match(name)
    if not match:
        return name, None
    stride = int(match["stride"]) if match["stride"] else None
    return match["module"], OutputRows(int(match["start"]), int(match["stop"]), stride)


def split_name(name: str) -> tuple[int, str] | None:
    """Layer number and last part of a module's name, `None` for modules outside the layers (embeddings, head)."""
    match = _LAYER.match(name)
    return (int(match["index"]), match["rest"].rsplit(".", 1)[-1]) if match else None


def sees_or_hears(name: str) -> bool:
    """Whether a module's name says that it lies beside the decoder, in a part that no text passes through."""
    match = _LAYER.match(name)
    return bool(SENSES.search(match["stem"] if match else name))


def layer_path(name: str) -> str:
    """`"model.layers.3.self_attn.q_proj"` → `"model.layers.3"`"""
    match = _LAYER.match(name)
    if match is None:
        raise ValueError(f"'{name}' is in no layer of a model.")
    return f"{match['stem']}.{match['index']}"


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of a model's decoder layers in order: the list of modules that has as many as the configuration says.

    If none has, the longest one. Lists within layers (experts) are none, nor are other towers than the text model's.

    Raises:
        ValueError: If it has none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for root in (decoder, model):
        prefix = next((name for name, module in model.named_modules() if module is root and name), "")
        lists: dict[str, int] = {}
        for name, module in root.named_modules(prefix=prefix):
            if (
                isinstance(module, nn.ModuleList)
                and len(module)
                and not name.startswith(tuple(f"{n}." for n in lists))
            ):
                lists[name] = len(module)
        if lists:
            depth = getattr(_text_config(model), "num_hidden_layers", None)
            stem = max(lists, key=lambda name: (lists[name] == depth, lists[name]))
            return [f"{stem}.{i}" for i in range(lists[stem])]
    raise ValueError(
        f"{type(model).__name__} has no list of layers (nn.ModuleList), so kernels cannot be placed in it."
    )


def find_places(model: nn.Module) -> dict[str, Place]:
    """All places of a model's decoder layers by name, in the model's order. Adapters on it are looked through.

    Roles are told by names, in the layouts of `ROLES` and the fused ones; where names are unknown, by shapes: the
    projections of queries, keys, values and attention outputs by the head counts of the configuration, and those
    around an inner width as gate, up and down. Of equal shapes, words in the name decide, then the order.
    """
    config = _text_config(model)
    places = {}
    for number, path in enumerate(layer_paths(model)):
        for linear in _roles(list(_linears(model.get_submodule(path))), config):
            name = f"{path}.{linear.name}"
            places[name] = Place(name, number, linear.name, linear.role, linear.found, linear.writes)
    return places


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all places within the decoder layers."""
    return list(find_places(model))


def place_size(model: nn.Module, name: str) -> tuple[int, int] | None:
    """Input and output width of a place, adapters on it looked through; `None` if the model has no such place."""
    module_name, rows = split_place(name)
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        return None
    size = linear_size(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
    if size is None or rows is None:
        return size
    return (size[0], rows.size(size[1])) if rows.fit(size[1]) else None


def place_of_name(name: str) -> Place | None:
    """The place that a bare name stands for, when there is no model to look at; `None` outside of layers."""
    match = _LAYER.match(name)
    if match is None:
        return None
    role = role_of(name) or ("o" if name.rsplit(".", 1)[-1] in OUTPUTS_BESIDE_QUERIES else None)
    return Place(name, int(match["index"]), match["rest"], role, "name", 0)


def role_of(name: str) -> str | None:
    """The role that a name is known for."""
    return _ROLE_OF.get(".".join(name.split(".")[-2:])) or _ROLE_OF.get(name.rsplit(".", 1)[-1])


def has_experts(layer: nn.Module) -> bool:
    """Whether a decoder layer's MLP is a mixture of experts."""
    return any(_holds_experts(name, module) for name, module in layer.named_modules())


def _holds_experts(name: str, module: nn.Module) -> bool:
    # transformers keeps all experts' weights in one module without linear layers, other code in a list of blocks
    return name.rsplit(".", 1)[-1] == "experts" or "Experts" in type(module).__name__


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config if config is None or not hasattr(config, "get_text_config") else config.get_text_config()


@dataclass(frozen=True)
class _Linear:
    """A linear module of a layer, or a part of one: its name within the layer, input and output width, role if
    known.
    """

    name: str
    reads: int
    writes: int
    role: str | None = None
    found: str = "name"

    @property
    def last(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def hints(self) -> set[str]:
        words = re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", self.name).lower())
        return {_HINTS[word] for word in words if word in _HINTS}


def _linears(layer: nn.Module) -> Iterator[_Linear]:
    """The linear modules of a layer, experts left out."""
    seen: tuple[str, ...] = ()
    for name, module in layer.named_modules():
        if name.startswith(seen):
            continue
        if _holds_experts(name, module):
            seen += (f"{name}.",)
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            seen += (f"{name}.",)
            module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
            module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if size := linear_size(module):
            yield _Linear(name, *size)


def _roles(linears: list[_Linear], config: Any) -> list[_Linear]:
    """The same modules with their roles, fused ones replaced by their parts."""
    roles: dict[str, str] = {}
    for linear in linears:
        role = role_of(linear.name)
        if linear.last in FUSED_ATTENTION + FUSED_MLP:
            role = "qkv" if linear.last in FUSED_ATTENTION else "gate_up"
        if role:
            roles[linear.name] = role
    for linear in linears:
        beside = {roles.get(other.name) for other in linears if other.parent == linear.parent}
        if linear.last in OUTPUTS_BESIDE_QUERIES and linear.name not in roles and beside & {"q", "qkv"}:
            roles[linear.name] = "o"
        if roles.get(linear.name) == "gate" and "up" not in beside:
            roles[linear.name] = "up"  # a lone matrix into the MLP
    linears = [replace(linear, role=roles.get(linear.name)) for linear in linears]
    guessed = _by_shape(linears, config)
    linears = [replace(lin, role=guessed[lin.name], found="shape") if lin.name in guessed else lin for lin in linears]
    return [part for linear in linears for part in _parts(linear, linears, config)]


def _parts(linear: _Linear, layer: list[_Linear], config: Any) -> list[_Linear]:
    """The projections in one module: itself, or the parts of a fused one."""
    if linear.role == "qkv":
        outputs = [other.reads for other in layer if other.role == "o" and other.parent == linear.parent]
        rows = attention_rows(linear.last, linear.writes, outputs[0] if outputs else _widths(config)[1], config)
    elif linear.role == "gate_up":
        half = linear.writes // 2
        rows = {"gate": OutputRows(0, half), "up": OutputRows(half, 2 * half)}
    else:
        return [linear]
    if rows is None:
        return [replace(linear, role=None)]
    return [replace(linear, name=f"{linear.name}[{part}]", role=role) for role, part in rows.items()]


def attention_rows(name: str, width: int, queries: int, config: Any) -> dict[str, OutputRows] | None:
    """Where queries, keys and values are in the output of a module that computes all three.

    One after the other (Phi-3, GPT-2, MPT, Falcon with one key for all heads); or interleaved: each group of heads
    that share a key is followed by its key and value (GPT-NeoX, BLOOM, Falcon otherwise, InternLM); or CodeGen's four
    blocks.

    Args:
        name (`str`): Last part of the module's name.
        width (`int`): Its outputs.
        queries (`int`): How many of them are queries: the input width of the attention's output projection.
        config: The text model's configuration.

    Returns:
        `dict[str, OutputRows]`: The rows of each role; `None` if the layout is unknown.
    """
    keys, heads = (width - queries) // 2, getattr(config, "num_attention_heads", None)
    if keys <= 0 or queries + 2 * keys != width or not heads or queries % heads:
        return None
    kind, size = getattr(config, "model_type", ""), queries // heads
    if kind == "codegen":
        part = width // 12
        return {role: OutputRows(i * part, (i + 1) * part, 3 * part) for i, role in enumerate(("q", "v", "k"))}
    one_per_head = keys == queries and not getattr(config, "multi_query", False)
    interleaved = one_per_head and (name == "query_key_value" or kind == "gpt_bigcode")
    if interleaved or getattr(config, "new_decoder_architecture", False) or name == "wqkv":
        stride = width // (keys // size)
        return {
            "q": OutputRows(0, stride - 2 * size, stride),
            "k": OutputRows(stride - 2 * size, stride - size, stride),
            "v": OutputRows(stride - size, stride, stride),
        }
    return {
        "q": OutputRows(0, queries),
        "k": OutputRows(queries, queries + keys),
        "v": OutputRows(queries + keys, width),
    }


def _widths(config: Any) -> tuple[int, int, int]:
    """Widths of the hidden states, of all heads' queries, and of all keys, 0 where the configuration does not tell."""
    hidden, heads = (getattr(config, name, None) or 0 for name in ("hidden_size", "num_attention_heads"))
    if not hidden or not heads:
        return hidden, hidden, hidden
    size = getattr(config, "head_dim", None) or hidden // heads
    return hidden, heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size


def _by_shape(linears: list[_Linear], config: Any) -> dict[str, str]:
    """Roles of modules whose names are unknown. Only whole sets are believed: all of an attention, all of an MLP."""
    hidden, queries, keys = _widths(config)
    roles: dict[str, str] = {}
    blocks = dict.fromkeys(linear.name.partition(".")[0] if linear.parent else "" for linear in linears)
    for block in blocks:
        inside = [lin for lin in linears if (lin.name.partition(".")[0] if lin.parent else "") == block]
        apart = {"q": (hidden, queries), "k": (hidden, keys), "v": (hidden, keys), "o": (queries, hidden)}
        fused = {"qkv": (hidden, queries + 2 * keys), "o": (queries, hidden)} if hidden else apart
        found = _assigned(inside, apart) or _assigned(inside, fused)
        roles |= {lin.name: role for role, lin in found.items() if lin.role is None}
    rest = [lin for lin in linears if lin.name not in roles and lin.role not in ("qkv", *ATTENTION)]
    for down in rest:
        inner = down.reads
        shapes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
        fused = {"gate_up": (hidden, 2 * inner), "down": (inner, hidden)}
        plain = {"up": (hidden, inner), "down": (inner, hidden)}
        if down.writes == hidden and down.role in (None, "down"):
            found = _assigned(rest, shapes) or _assigned(rest, fused) or _assigned(rest, plain)
            if found:
                return roles | {lin.name: role for role, lin in found.items() if lin.role is None}
    return roles


def _assigned(linears: Iterable[_Linear], shapes: dict[str, tuple]) -> dict[str, _Linear]:
    """One module for each role, those with the role first; empty if a role finds none."""
    found = {linear.role: linear for linear in linears if linear.role in shapes}
    unknown = [linear for linear in linears if linear.role is None]
    for hinted in (True, False):
        for linear in unknown:
            if any(linear is other for other in found.values()):
                continue
            fits = [r for r, shape in shapes.items() if r not in found and shape == (linear.reads, linear.writes)]
            fits = [role for role in fits if role in linear.hints] if hinted else fits
            if fits:
                found[fits[0]] = linear
    return found if len(found) == len(shapes) else {}


def layer_count(model: PreTrainedModel) -> int:
    """Number of decoder layers."""
    return len(layer_paths(model))
