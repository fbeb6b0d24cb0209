"""Configuration of a CAST adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType

from .checks import (
    FLOATS,
    MAX_RANK,
    MAX_WIDTH,
    TensorInfo,
    check_fields,
    check_number,
    is_name,
    read_header,
    read_json,
    shown,
)


class OutputRows(NamedTuple):
    """Rows of the output of a module that computes several projections at once, e.g. the keys of a fused `qkv_proj`.

    Rows `start` to `stop` of every `stride` rows; of all rows when `stride` is `None`. The blocks of `stride` rows are
    heads, or groups of heads that share a key, in models that interleave queries, keys and values.
    """

    start: int
    stop: int
    stride: int | None = None

    def fit(self, width: int) -> bool:
        """Whether a module with `width` outputs has these rows."""
        stride = width if self.stride is None else self.stride
        return 0 <= self.start < self.stop <= stride and width % stride == 0

    def size(self, width: int) -> int:
        """How many rows these are of a module with `width` outputs."""
        return (self.stop - self.start) * (1 if self.stride is None else width // self.stride)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Take these rows: (..., width) → (..., size)."""
        return x.unflatten(-1, (-1, self.stride or x.shape[-1]))[..., self.start : self.stop].flatten(-2)

    def into(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """Put them back among zeros: (..., size) → (..., width)."""
        blocks = x.unflatten(-1, (-1, self.stop - self.start))
        return F.pad(blocks, (self.start, (self.stride or width) - self.stop)).flatten(-2)

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}" + (f"/{self.stride}" if self.stride else "")


@dataclass(frozen=True)
class KernelSpec:
    """Shape and origin of one frozen kernel `scaling * B @ A`, the LoRA of one source module.

    Args:
        r (`int`): The rank of the kernel.
        in_features (`int`): Input width of the source module; `A` has shape `(r, in_features)`.
        out_features (`int`): Output width of the source module; `B` has shape `(out_features, r)`.
        scaling (`float`): The LoRA scaling, e.g. `lora_alpha / r`.
        source_place (`str`, *optional*): Name of the module in the source model, `None` for a random kernel. If the
            kernel is a part of the module's (fused projections), with the rows of its output:
            `"h.0.attn.c_attn[0:768]"`.
        rows (`OutputRows`, *optional*): The rows of the target module's output on which the kernel lands, all when
            `None`.

    Raises:
        ValueError: If a size is not a positive integer, or absurd, or another value is of the wrong type.
    """

    r: int
    in_features: int
    out_features: int
    scaling: float = 1.0
    source_place: str | None = None
    rows: OutputRows | None = None

    def __post_init__(self):
        for name, most in (("r", MAX_RANK), ("in_features", MAX_WIDTH), ("out_features", MAX_WIDTH)):
            check_number(f"`{name}` of a kernel", getattr(self, name), 1, most, whole=True)
        check_number("`scaling` of a kernel", self.scaling)
        if self.source_place is not None and not is_name(self.source_place):
            raise ValueError(f"`source_place` of a kernel must be a name, got {shown(self.source_place)}.")
        if self.rows is not None:  # adapter_config.json stores a list
            try:
                object.__setattr__(self, "rows", OutputRows(*self.rows))
                for number in self.rows[: 2 if self.rows.stride is None else 3]:
                    check_number("rows", number, 0, MAX_WIDTH, whole=True)
            except (TypeError, ValueError):
                raise ValueError(f"`rows` of a kernel must be 2 or 3 integers, got {shown(self.rows)}.") from None


@dataclass
class CastConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`CastModel`].

    CAST (Cartridge Activation Space Transfer, https://arxiv.org/abs/2510.17902) runs the frozen LoRA of a source model
    on a target model: `y = W x + scaling * P_out B A P_in x`. Only the projections `P_in` and `P_out` are trained.

    Args:
        r (`int`): Rank of the random kernel that a target module gets when `kernels` is not given.
        target_modules (`Union[list[str], str]`, *optional*):
            The names of the modules of the target model to adapt: a list of names or suffixes, a regex, or
            `"all-linear"`. Defaults to the names in `kernels`, else to PEFT's LoRA default for the architecture.
        projection_type (`str`):
            `"factored"` (default) trains each projection as `U V` with an inner size of `projection_size`; `"compact"`
            trains of the side that meets the kernel only what the kernel sees, half the parameters for the same maps;
            `"full"` trains the matrices themselves, `in_S * in_T + out_T * out_S` parameters; `"mlp"` adds a nonlinear
            part to factored ones, `U V x + mlp_U gelu(mlp_V x)`: such an adapter cannot be merged or converted to a
            LoRA.
        projection_size (`int`, *optional*):
            Inner size of factored projections, and of the MLP. Defaults to the kernel's rank, the smallest size that
            can express every full matrix, because only `A P_in` and `P_out B` matter.
        projection_bias (`bool`): Whether projections have a bias, which rules out merging and conversion as well.
        projection_sharing (`str`, *optional*):
            `"layer"`: modules of a layer share the projections of equal shape; `"all"`: all modules do. They do not by
            default. Shared factored projections need a larger `projection_size`.
        kernels (`dict[str, list[KernelSpec]]`, *optional*):
            For each target module (full name) the kernels that land on it; their deltas are summed. Filled in by
            `peft_cast.translate`. When omitted, every target module gets one random kernel of rank `r`.
        init_weights (`bool`): Whether to start as a no-op (`P_out = 0`, default); else `P_out` is random, for testing.
        exclude_modules (`Union[list[str], str]`, *optional*): Names of the modules not to adapt, a list or regex.
        layers_to_transform (`Union[list[int], int]`, *optional*): The layer indexes to adapt; all when omitted.
        layers_pattern (`Union[list[str], str]`, *optional*): The layer pattern name, for `layers_to_transform`.
        modules_to_save (`list[str]`, *optional*): Other modules to train and save whole, e.g. a classification head.
        source_model_name_or_path (`str`, *optional*): The model on which the kernels were trained.
        source_model_revision (`str`, *optional*): Its revision.
        source_adapter_name_or_path (`str`, *optional*): The LoRA from which the kernels were taken.
        source_adapter_revision (`str`, *optional*): Its revision.
        not_carried (`dict[str, list[str]]`, *optional*): What of the source adapter no kernel expresses (a head
            trained in full, biases): what it is, and on which modules of the source.
    """

    r: int = field(default=8, metadata={"help": "Rank of random kernels, used when `kernels` is not given."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt, or 'all-linear'."}
    )
    projection_type: Literal["factored", "compact", "full", "mlp"] = field(
        default="factored", metadata={"help": "Thin factors, what the kernel sees of them, matrices, or nonlinear."}
    )
    projection_size: int | None = field(default=None, metadata={"help": "Inner size of factored projections."})
    projection_bias: bool = field(default=False, metadata={"help": "Whether projections have a bias."})
    projection_sharing: Literal["layer", "all"] | None = field(
        default=None, metadata={"help": "Who shares projections."}
    )
    kernels: dict[str, list[KernelSpec]] | None = field(default=None, metadata={"help": "Kernels by target module."})
    init_weights: bool = field(default=True, metadata={"help": "Whether to start as a no-op (P_out = 0)."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "The modules not to adapt."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "The layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "The layer pattern name."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    source_model_name_or_path: str | None = field(default=None, metadata={"help": "The model of the kernels."})
    source_model_revision: str | None = field(default=None, metadata={"help": "Revision of the source model."})
    source_adapter_name_or_path: str | None = field(default=None, metadata={"help": "The LoRA of the kernels."})
    source_adapter_revision: str | None = field(default=None, metadata={"help": "Revision of the source LoRA."})
    not_carried: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "What of the source LoRA no kernel expresses, and on which modules."}
    )

    def __post_init__(self):
        check_fields(type(self), vars(self))
        super().__post_init__()
        self.peft_type = PeftType.CAST
        kind = self.projection_type
        if self.projection_sharing and kind == "compact":
            raise ValueError(
                "A compact projection is made for one kernel and cannot be shared: pass `projection_type='full'`, or "
                "'factored' with a `projection_size`."
            )
        if self.projection_size is not None and kind == "full":
            raise ValueError("`projection_size` has no meaning with `projection_type='full'`: leave it out.")
        if self.projection_sharing and kind != "full" and self.projection_size is None:
            raise ValueError(
                "Shared projections serve many kernels, so the rank of one is no sensible inner size: pass "
                "`projection_size`, or `projection_type='full'`."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.kernels is not None:
            # adapter_config.json stores plain dictionaries
            self.kernels = {name: [_spec(name, spec) for spec in specs] for name, specs in self.kernels.items()}
            if not self.kernels or not all(self.kernels.values()):
                raise ValueError("`kernels` must name at least one target module, each with at least one kernel.")
            if self.target_modules is None:
                self.target_modules = set(self.kernels)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), list):
                setattr(self, name, set(names))

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        values = read_json(path_json_file)
        if odd := {"self", "cls"} & values.keys():
            raise ValueError(f"{Path(path_json_file).name} has the key '{odd.pop()}', which is no setting: delete it.")
        return super().from_json_file(path_json_file, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As in PEFT. Of a folder that has weights too, their header is compared with the configuration.

        Raises:
            ValueError: If the configuration is broken, or says something else than the file of weights.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        weights = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if isinstance(config, cls) and weights.is_file():
            config.check_weights(read_header(weights))
        return config

    def projection_shapes(
        self, side: str, in_features: int | None, out_features: int | None, size: int, r: int
    ) -> dict[str, tuple[int | None, int | None]]:
        """Shapes of the matrices in a `Projection`, whose arguments these are, by name; an unknown width is `None`."""
        U, V = (out_features, size), (size, in_features)
        if self.projection_type == "full":
            return {"W": (out_features, in_features)}
        if self.projection_type == "compact":
            return {"C": (r, size), "V": V} if side == "in" else {"U": U, "C": (size, r)}
        return {"U": U, "V": V, "mlp_U": U, "mlp_V": V} if self.projection_type == "mlp" else {"U": U, "V": V}

    def check_weights(self, header: Mapping[str, TensorInfo]) -> None:
        """Compare the configuration with the header of the file that belongs to it, before anything is allocated.

        Args:
            header: By name in the file, `base_model.model.{module}.peft_cast_kernels.{number}.A` and so on.

        Raises:
            ValueError: If a kernel of the configuration is not in the file, or its tensors are of other shapes or
                types.
        """
        found: dict[tuple[str, int, str], TensorInfo] = {}
        others = []
        for name, info in header.items():
            if match := _KERNEL.fullmatch(name):
                found[match["module"], int(match["number"]), match["part"]] = info
            else:
                others.append(name)
        wanted: dict[tuple[str, int], KernelSpec | None] = {(module, i): None for module, i, _ in found}
        for module, specs in (self.kernels or {}).items():
            wanted |= {(module, i): spec for i, spec in enumerate(specs)}
        if not wanted:
            raise ValueError(f"The weights of this CAST adapter hold no kernel at all: {_AGAIN}.")
        if self.modules_to_save and not any(f".{m}." in name for m in self.modules_to_save for name in others):
            raise ValueError(f"This CAST adapter's weights lack `modules_to_save`, {self.modules_to_save}: {_AGAIN}.")
        for (module, i), spec in wanted.items():
            r, ins, outs = (spec.r, spec.in_features, spec.out_features) if spec else (self.r, None, None)
            shapes: dict[str, tuple[int | None, int | None]] = {"A": (r, ins), "B": (outs, r)}
            for side, width_in, width_out in (("in", None, ins), ("out", outs, None)):
                matrices = self.projection_shapes(side, width_in, width_out, self.projection_size or r, r)
                shapes |= {f"P_{side}.{name}": shape for name, shape in matrices.items()}
            for part, shape in shapes.items():
                name, tensor = f"{module}.peft_cast_kernels.{i}.{part}", found.get((module, i, part))
                if tensor is None:
                    raise ValueError(f"The CAST adapter's file lacks the tensor {shown(name)}: {_AGAIN}.")
                if tensor.dtype not in FLOATS:
                    raise ValueError(f"The CAST adapter's tensor {shown(name)} is of type {tensor.dtype}: {_AGAIN}.")
                if len(tensor.shape) != 2 or any(want not in (None, got) for want, got in zip(shape, tensor.shape)):
                    wanted_shape = " x ".join("any" if n is None else str(n) for n in shape)
                    raise ValueError(
                        f"The CAST adapter's tensor {shown(name)} has shape {tensor.shape} in its file, its "
                        f"configuration says {wanted_shape}: {_AGAIN}."
                    )


_KERNEL = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.peft_cast_kernels\.(?P<number>\d{1,6})\.(?P<part>.+)")
_AGAIN = "the two do not belong together, or are incomplete: download both again"


def _spec(module: str, values: KernelSpec | Mapping[str, Any]) -> KernelSpec:
    if isinstance(values, KernelSpec):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"A kernel of {shown(module)} must be an object, got {shown(values)}.")
    try:  # `source_place` was called `source_module` up to version 0.1
        return KernelSpec(**{"source_place" if name == "source_module" else name: values[name] for name in values})
    except TypeError:
        known = ", ".join(KernelSpec.__dataclass_fields__)
        raise ValueError(
            f"A kernel of {shown(module)} must have r, in_features and out_features, and may have {known}; it has "
            f"{shown(list(values))}."
        ) from None
