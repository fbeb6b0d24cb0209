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


class Rows(NamedTuple):
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
        source_module (`str`, *optional*): Name of the module in the source model, `None` for a random kernel. If the kernel
            is a part of the module's (fused projections), with the rows of its output: `"h.0.attn.c_attn[0:768]"`.
        rows (`Rows`, *optional*): The rows of the target module's output on which the kernel lands, all when `None`.

    Raises:
        ValueError: If a size is not a positive integer, or absurd, or another value is of the wrong type.
    """

    r: int
    in_features: int
    out_features: int
    scaling: float = 1.0
    source_module: str | None = None
    rows: Rows | None = None

    def __post_init__(self):
        for name, most in (("r", MAX_RANK), ("in_features", MAX_WIDTH), ("out_features", MAX_WIDTH)):
            check_number(f"`{name}` of a kernel", getattr(self, name), 1, most, whole=True)
        check_number("`scaling` of a kernel", self.scaling)
        if self.source_module is not None and not is_name(self.source_module):
            raise ValueError(f"`source_module` of a kernel must be a name, got {shown(self.source_module)}.")
        if self.rows is not None:  # adapter_config.json stores a list
            try:
                object.__setattr__(self, "rows", Rows(*self.rows))
                for number in self.rows[: 2 if self.rows.stride is None else 3]:
                    check_number("rows", number, 0, MAX_WIDTH, whole=True)
            except (TypeError, ValueError):
                raise ValueError(
                    f"`rows` of a kernel must be two or three integers, got {shown(self.rows)}."
                ) from None


@dataclass
class CastConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`CastModel`].

    CAST (Cartridge Activation Space Transfer, https://arxiv.org/abs/2510.17902) runs the frozen LoRA of a source model
    on a target model: `y = W x + scaling * P_out B A P_in x`. Only the projections `P_in` and `P_out` are trained.

    Args:
        r (`int`):
            Rank of the random kernel that a target module gets when `kernels` is not given.
        target_modules (`Union[list[str], str]`, *optional*):
            The names of the modules of the target model to adapt: a list of names or suffixes, a regex, or
            `"all-linear"`. Defaults to the names in `kernels`, else to PEFT's LoRA default for the architecture.
        projection_type (`str`):
            `"factored"` (default) trains each projection as `U V` with an inner size of `projection_size`; `"compact"` trains of
            the side that meets the kernel only what the kernel sees, half the parameters for the same maps; `"full"` trains
            the matrices themselves, `in_S * in_T + out_T * out_S` parameters; `"mlp"` adds a nonlinear part to factored
            ones, `U V x + mlp_U gelu(mlp_V x)`: such an adapter cannot be merged or converted to a LoRA.
        projection_size (`int`, *optional*):
            Inner size of factored projections, and of the MLP. Defaults to the kernel's rank, the smallest size that can
            express every full matrix, because only `A P_in` and `P_out B` matter.
        projection_bias (`bool`):
            Whether projections have a bias. Such an adapter cannot be merged or converted to a LoRA either.
        projection_sharing (`str`, *optional*):
            `"layer"`: modules of a layer share the projections of equal shape; `"all"`: all modules do. They do not by
            default. Shared factored projections need a larger `projection_size`.
        kernels (`dict[str, list[KernelSpec]]`, *optional*):
            For each target module (full name) the kernels that land on it; their deltas are summed. Filled in by
            `peft_cast.translate`. When omitted, every target module gets one random kernel of rank `r`.
        init_weights (`bool`):
            Whether to start as a no-op (`P_out = 0`, default). `False` starts with random `P_out`, for testing.
        exclude_modules (`Union[list[str], str]`, *optional*):
            The names of the modules not to adapt, as a list or regex.
        layers_to_transform (`Union[list[int], int]`, *optional*):
            The layer indexes to adapt; all when omitted.
        layers_pattern (`Union[list[str], str]`, *optional*):
            The layer pattern name, used only with `layers_to_transform`.
        modules_to_save (`list[str]`, *optional*):
            Modules besides the adapted ones that are trained and saved whole, e.g. a classification head.
        source_model_name_or_path (`str`, *optional*): The model on which the kernels were trained.
        source_model_revision (`str`, *optional*): Its revision.
        source_adapter_name_or_path (`str`, *optional*): The LoRA from which the kernels were taken.
        source_adapter_revision (`str`, *optional*): Its revision.
    """

    r: int = field(default=8, metadata={"help": "Rank of random kernels, used when `kernels` is not given."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names, suffixes or regex of the target model's modules to adapt, or 'all-linear'."},
    )
    projection_type: Literal["factored", "compact", "full", "mlp"] = field(
        default="factored",
        metadata={"help": "Products of two thin factors, what the kernel sees of them, full matrices, or nonlinear."},
    )
    projection_size: int | None = field(
        default=None, metadata={"help": "Inner size of factored projections; defaults to the kernel's rank."}
    )
    projection_bias: bool = field(default=False, metadata={"help": "Whether projections have a bias."})
    projection_sharing: Literal["layer", "all"] | None = field(
        default=None, metadata={"help": "Who shares projections of equal shape: the modules of a layer, or all."}
    )
    kernels: dict[str, list[KernelSpec]] | None = field(
        default=None, metadata={"help": "The kernels that land on each target module (full module name)."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Whether to start as a no-op (P_out = 0)."})
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of the modules not to adapt."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "The layer indexes to adapt; all when omitted."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The layer pattern name, used only with `layers_to_transform`."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save whole, e.g. a classification head."}
    )
    source_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model on which the kernels were trained."}
    )
    source_model_revision: str | None = field(default=None, metadata={"help": "Revision of the source model."})
    source_adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "The LoRA from which the kernels were taken."}
    )
    source_adapter_revision: str | None = field(default=None, metadata={"help": "Revision of the source LoRA."})

    def __post_init__(self):
        check_fields(type(self), vars(self))
        super().__post_init__()
        self.peft_type = PeftType.CAST
        if self.projection_type not in ("factored", "compact", "full", "mlp"):
            raise ValueError(
                f"`projection_type` must be 'factored', 'compact', 'full' or 'mlp', got {self.projection_type!r}."
            )
        if self.projection_sharing and self.projection_type == "compact":
            raise ValueError(
                "A compact projection is made for one kernel and cannot be shared: pass `projection_type='full'`, or "
                "'factored' with a `projection_size`."
            )
        if self.projection_sharing not in (None, "layer", "all"):
            raise ValueError(f"`projection_sharing` must be None, 'layer' or 'all', got {self.projection_sharing!r}.")
        if self.projection_size is not None and self.projection_type == "full":
            raise ValueError("`projection_size` has no meaning with `projection_type='full'`: leave it out.")
        if self.projection_sharing and self.projection_type != "full" and self.projection_size is None:
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
        self.target_modules = (
            set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        )
        self.exclude_modules = (
            set(self.exclude_modules) if isinstance(self.exclude_modules, list) else self.exclude_modules
        )

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

    def check_weights(self, header: Mapping[str, TensorInfo]) -> None:
        """Compare the configuration with the header of the file that belongs to it, before anything is allocated.

        Args:
            header: By name in the file, `base_model.model.{module}.peft_cast_kernels.{number}.A` and so on.

        Raises:
            ValueError: If a kernel of the configuration is not in the file, or its tensors are of other shapes or types.
        """
        found: dict[tuple[str, int], dict[str, TensorInfo]] = {}
        for name, info in header.items():
            if match := _KERNEL.fullmatch(name):
                found.setdefault((match["module"], int(match["number"])), {})[match["part"]] = info
        wanted: dict[tuple[str, int], KernelSpec | None] = dict.fromkeys(found)
        for module, specs in (self.kernels or {}).items():
            wanted.update({(module, i): spec for i, spec in enumerate(specs)})
        if not wanted:
            raise ValueError(f"The weights of this CAST adapter hold no kernel at all: {_AGAIN}.")
        others = [name for name in header if not _KERNEL.fullmatch(name)]
        if self.modules_to_save and not any(f".{m}." in name for m in self.modules_to_save for name in others):
            raise ValueError(
                f"The weights of this CAST adapter lack `modules_to_save`, {self.modules_to_save}: {_AGAIN}."
            )
        for (module, i), spec in wanted.items():
            r, ins, outs = (spec.r, spec.in_features, spec.out_features) if spec else (self.r, None, None)
            size = self.projection_size or r
            shapes = {"A": (r, ins), "B": (outs, r)}
            if self.projection_type == "full":
                shapes |= {"P_in.W": (ins, None), "P_out.W": (None, outs)}
            elif self.projection_type == "compact":
                shapes |= {"P_in.C": (r, size), "P_in.V": (size, None), "P_out.U": (None, size), "P_out.C": (size, r)}
            else:
                for kind in ("", "mlp_") if self.projection_type == "mlp" else ("",):
                    shapes |= {f"P_in.{kind}U": (ins, size), f"P_in.{kind}V": (size, None)}
                    shapes |= {f"P_out.{kind}U": (None, size), f"P_out.{kind}V": (size, outs)}
            parts = found.get((module, i), {})
            for part, shape in shapes.items():
                name, tensor = f"{module}.peft_cast_kernels.{i}.{part}", parts.get(part)
                if tensor is None:
                    raise ValueError(f"The CAST adapter's file lacks the tensor {shown(name)}: {_AGAIN}.")
                if tensor.dtype not in FLOATS:
                    raise ValueError(f"The CAST adapter's tensor {shown(name)} is of type {tensor.dtype}: {_AGAIN}.")
                if len(tensor.shape) != 2 or any(want not in (None, got) for want, got in zip(shape, tensor.shape)):
                    wanted_shape = " x ".join("any" if n is None else str(n) for n in shape)
                    raise ValueError(
                        f"The CAST adapter's tensor {shown(name)} has shape {tensor.shape} in its file, its configuration says "
                        f"{wanted_shape}: {_AGAIN}."
                    )


_KERNEL = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.peft_cast_kernels\.(?P<number>\d{1,6})\.(?P<part>.+)")
_AGAIN = "the two do not belong together, or are incomplete: download both again"


def _spec(module: str, values: KernelSpec | Mapping[str, Any]) -> KernelSpec:
    if isinstance(values, KernelSpec):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"A kernel of {shown(module)} must be an object, got {shown(values)}.")
    try:
        return KernelSpec(**values)
    except TypeError:
        known = ", ".join(KernelSpec.__dataclass_fields__)
        raise ValueError(
            f"A kernel of {shown(module)} must have r, in_features and out_features, and may have {known}; it has "
            f"{shown(list(values))}."
        ) from None
