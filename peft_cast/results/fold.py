"""Fold a CAST adapter into a plain LoRA, which anything that serves LoRA can serve without this package."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ..models import check_unwrapped, load_on_skeleton, skeleton
from ..options import Pairing
from ..source import SAVED, list_not_carried, read_holdings
from ..tuner import CastConfig, CastLayer
from ..tuner.checks import number_of, read_json
from ..tuner.merging import check_foldable
from ..utils import (
    as_path,
    check_model_config,
    check_place,
    check_weights,
    complete_folder,
    find_file,
    one_line,
    read_adapter_config,
    secrets_removed,
    why_no_model,
    without_secrets,
    write_json,
    write_tensors,
)
from ..utils.fields import check_count, check_option
from .artifacts import METRICS_NAME, Origin, replacing_folder, with_not_carried
from .beside import FOLDED_FROM, PLACES, check_formats, digest_of
from .gguf_file import check_gguf, write_gguf
from .mlx_folder import check_mlx, write_mlx
from .publish import Publishable, add_card
from .rows import Evaluation


MOST_SERVED = 512  # the largest rank that a server takes (vLLM)


@dataclass(frozen=True)
class FoldedLora(Publishable):
    """A plain LoRA.

    Args:
        config ([`~peft.LoraConfig`]): One rank for all modules, scaling 1, as servers want it.
        weights (`dict[str, torch.Tensor]`): By the keys of an adapter file: `….lora_A.weight` (r, in_T) and
            `….lora_B.weight` (out_T, r).
        errors (`dict[str, float]`): For each module `‖ΔW − B A‖ / ‖ΔW‖` in the Frobenius norm; 0.0 where nothing was
            cut.
        origin (`dict[str, str]`): The fields of the CAST adapter's configuration that name its source model and
            adapter.
        report (`dict`): What the `cast_metrics.json` of the CAST adapter holds; empty if it has none.
        not_folded (`list[dict]`): Parts of the CAST adapter that a LoRA on these modules has no place for: `module`
            and `what`.
        target (`PretrainedConfig`, *optional*): The target model's configuration, for formats that are read without
            it; `None` if it has none.
        folded_from (`str`, *optional*): SHA-256 of the CAST adapter's weights file, if it was folded from one.
    """

    config: LoraConfig
    weights: dict[str, torch.Tensor]
    errors: dict[str, float]
    origin: Mapping[str, str | None] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    not_folded: Sequence[Mapping[str, str]] = ()
    target: PretrainedConfig | None = field(default=None, repr=False)
    folded_from: str | None = None

    @property
    def not_carried(self) -> list[dict[str, str]]:
        """What of the source's adapter no kernel expressed when it was translated: `module` and `what`."""
        return list(self.report.get("metrics", {}).get("source", {}).get("not_carried", ()))

    def save_pretrained(
        self, folder: str | Path, *, evaluation: Evaluation | None = None, evaluated_as: str | None = None
    ) -> None:
        """Write an ordinary LoRA folder, which `PeftModel.from_pretrained`, vLLM and others load, with a model card.

        `cast_metrics.json` says what it was folded from, and with which errors.

        Args:
            folder: Where.
            evaluation, evaluated_as: What `evaluate` measured, for the card, as in `push_to_hub`.

        Raises:
            ValueError: If several of the evaluated adapters could be meant: pass `evaluated_as`; if the folder holds
                something else than a LoRA, such as the CAST adapter.
        """
        check_place(folder, kind="LORA")
        with replacing_folder(folder) as partial:
            add_card(self._save(partial), evaluation, evaluated_as)

    def save_gguf(self, file: str | Path) -> None:
        """Write the LoRA for llama.cpp (`llama-cli -m base.gguf --lora FILE`) and what builds on it, in the precision
        that it was folded with.

        Args:
            file: Where; it appears complete or not at all.

        Raises:
            ValueError: If the target's architecture or a module is none for which llama.cpp's tensors are known here,
                a value does not fit the precision, or the file holds something else than a GGUF LoRA.
            ImportError: If the `gguf` package is missing.
            OSError: If the file cannot be written.
        """
        named = {"description": "general.description"}
        about = {named.get(key, key): value for key, value in self._about().items()}
        write_gguf(self._factors(), self._target(), file, name=self._title, about=about)

    def save_mlx(self, folder: str | Path) -> None:
        """Write the LoRA for mlx-lm (`mlx_lm.generate --adapter-path FOLDER`), in the precision that it was folded
        with.

        Args:
            folder: Where.

        Raises:
            ValueError: If the modules of the target's architecture are not known to have the same names in mlx-lm, or
                the folder holds something else.
            OSError: If the files cannot be written.
        """
        about = {"model": str(without_secrets(self.config.base_model_name_or_path)), **self._about()}
        write_mlx(self._factors(), self._target(), folder, about)

    def _factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A (r, in) and B (out, r) by the full name of the module."""
        start, end = "base_model.model.", ".lora_A.weight"
        names = [key[len(start) : -len(end)] for key in self.weights if key.endswith(end)]
        return {n: (self.weights[f"{start}{n}{end}"], self.weights[f"{start}{n}.lora_B.weight"]) for n in names}

    def _target(self) -> PretrainedConfig:
        if self.target is None:
            raise ValueError("The target has no configuration, which GGUF and MLX need: call `save_pretrained`.")
        return self.target

    @property
    def _title(self) -> str:
        source, adapter = (self.origin.get(f"source_{of}_name_or_path") for of in ("model", "adapter"))
        named = Origin(adapter).label if adapter and adapter != source else f"LoRA of {Origin(source).label}"
        return f"{named} for {Origin(self.config.base_model_name_or_path).label}"

    def _about(self) -> dict[str, str]:
        """What it is and what it lacks, in a few words, for formats that keep metadata."""
        lost = [list_not_carried(parts) for parts in (self.not_carried, self.not_folded) if parts]
        lacks = f"; not carried over: {', '.join(lost)}" if lost else ""
        error = max(self.errors.values(), default=0.0)
        how = f"with a relative error of at most {error:.3f}" if error else "exactly"
        said = {"description": f"Translated with peft-cast and folded {how}{lacks}"}
        return said | ({FOLDED_FROM: self.folded_from} if self.folded_from else {})

    def _save(self, folder: Path) -> Path:
        write_tensors(self.weights, folder / SAFETENSORS_WEIGHTS_NAME, format="pt")
        self.config.save_pretrained(str(folder))
        folded = {"rank": self.config.r, "errors": self.errors, "origin": self.origin}
        folded |= {"not_carried": list(self.not_folded)} if self.not_folded else {}
        folded |= {FOLDED_FROM: self.folded_from} if self.folded_from else {}
        # Scores of the CAST adapter are not those of a LoRA that lost something.
        kept = {k: v for k, v in self.report.items() if k != "evaluation" or not any(self.errors.values())}
        write_json({**kept, "folded": folded}, folder / METRICS_NAME)
        return folder

    def __str__(self) -> str:
        cut = [error for error in self.errors.values() if error]
        said = f"LoRA of rank {self.config.r} on {number_of(len(self.errors), 'module')}"
        if cut:
            said += (
                f"; {len(cut)} {'was' if len(cut) == 1 else 'were'} cut, relative error of the weight change "
                f"{fmean(self.errors.values()):.3f} in the mean, {max(cut):.3f} at most"
            )
        else:
            said += ", exact"
        if self.not_carried:
            said += f"\nNot carried over from the source adapter: {list_not_carried(self.not_carried)}"
        if self.not_folded:
            said += f"\nNot carried over from the CAST adapter: {list_not_carried(self.not_folded)}"
        return said


# How each format is written: what is checked before the LoRA is made, and the method.
FORMATS: dict[str, tuple[Callable[[str], Any], Callable[[FoldedLora, str | Path], None]]] = {
    "peft": (partial(check_place, kind="LORA"), FoldedLora.save_pretrained),
    "gguf": (check_gguf, FoldedLora.save_gguf),
    "mlx": (check_mlx, FoldedLora.save_mlx),
}


def check_beside(folder: Path, formats: str | Iterable[str]) -> list[str]:
    """Refuse formats that there are not, or whose places in a folder are taken. Returns their names."""
    for name in (names := check_formats(formats)):
        FORMATS[name][0](str(folder / PLACES[name]))
    return names


def fold_beside(folder: Path, formats: str | Iterable[str], folded: FoldedLora | None = None) -> None:
    """Put the plain LoRA beside a saved CAST adapter, at `PLACES`.

    Args:
        folder: Of the adapter.
        formats: Of `FORMATS`, in a sequence or a text with commas.
        folded: The LoRA, if it is there already.

    Raises:
        ValueError: If there is no such format; as `to_lora` and the methods of `FORMATS`.
    """
    if not (names := check_beside(folder, formats)):
        return
    folded = replace(folded or to_lora(folder), folded_from=digest_of(folder / SAFETENSORS_WEIGHTS_NAME))
    for name in names:
        place = folder / PLACES[name]
        if name == "peft":  # without a card: the adapter's tells of it
            with complete_folder(place) as partly:
                folded._save(partly)
        else:
            FORMATS[name][1](folded, place)


def to_lora(
    adapter: str | Path | PeftModel,
    rank: int | None = None,
    *,
    adapter_name: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> FoldedLora:
    """Fold a CAST adapter: `A' = A P_in`, `B' = s P_out B`, kernels on one module stacked. Exact, unless `rank` cuts.

    Args:
        adapter: A PeftModel with the adapter, or the folder or hub id of one, for which the target model's
            configuration is read but not its weights.
        rank (`int`, *optional*): The rank of the LoRA: the largest stacked rank when `None`. Servers accept only some
            (vLLM: 8, 16, 32, 64, ..., 16 at most by default). A larger one pads with zeros, which changes nothing; a
            smaller one keeps the leading singular directions of each module's change, the best of that rank.
        adapter_name (`str`, *optional*): Which adapter of the PeftModel; the active one when not given.
        revision (`str`, *optional*): Hub revision of the adapter.
        dtype (`torch.dtype`): Of the weights.

    Returns:
        `FoldedLora`

    Raises:
        ValueError: If it is no CAST adapter, has nonlinear projections or biases, or `rank` is not positive, or
            larger than the model is wide and servers take.
    """
    adapter = as_path(adapter)
    check_count("rank", rank, 1)
    check_option("dtype", dtype, Pairing)
    dtype = dtype or torch.float32
    if not isinstance(adapter, (str, Path, PeftModel)):
        check_unwrapped(adapter, "adapter")
        raise ValueError(
            "`adapter` must be the folder or hub id of a CAST adapter, or the PeftModel that has it "
            f"(`result.model`), got {type(adapter).__name__}."
        )
    model = adapter if isinstance(adapter, PeftModel) else _load(adapter, revision)
    if adapter_name is None and len(model.active_adapters) != 1:
        raise ValueError(f"The active adapters are {model.active_adapters}: pass one of them as `adapter_name`.")
    adapter_name = model.active_adapters[0] if adapter_name is None else adapter_name
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, CastConfig):
        raise ValueError(f"'{adapter_name}' is no CAST adapter of this model, so there is nothing to fold.")
    base, factors = model.get_base_model(), {}
    for name, module in base.named_modules():
        if isinstance(module, CastLayer) and adapter_name in module.peft_cast_kernels:
            check_foldable(module, adapter_name)
            factors[name] = tuple(f.detach().float().cpu() for f in module.get_factors(adapter_name))
    r = rank or max(len(A) for A, _ in factors.values())
    most = max(MOST_SERVED, *(max(A.shape[1], len(B)) for A, B in factors.values()))
    if r > most:
        raise ValueError(f"`rank` is {r}, and none above {most} is of use: pass a smaller one, or leave it out.")
    weights, errors = {}, {}
    for name, (A, B) in factors.items():
        A, B, errors[name] = _of_rank(A, B, r)
        weights[f"base_model.model.{name}.lora_A.weight"] = A.to(dtype).contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = B.to(dtype).contiguous()
    lora = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=_target_modules(factors, base),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        fan_in_fan_out=any(isinstance(base.get_submodule(name).get_base_layer(), Conv1D) for name in factors),
    )
    _warn_of_experts(lora, model)
    not_folded = _besides(model, adapter_name) if model is adapter else read_holdings(adapter, revision).not_carried
    if not_folded:
        warnings.warn(
            f"Not carried over to the LoRA: {list_not_carried(not_folded)}. Servers have no place for it: merge the "
            "CAST adapter into the model (`merge_and_unload`), or serve it unfolded."
        )
    origin = {key: value for key, value in vars(config).items() if key.startswith("source_")}
    report: dict[str, Any] = {}
    of = None
    if not isinstance(adapter, PeftModel):
        with suppress(OSError, ValueError, EntryNotFoundError):  # they may be in another format
            of = digest_of(find_file(adapter, SAFETENSORS_WEIGHTS_NAME, revision))
        with suppress(OSError, ValueError, EntryNotFoundError):  # it may have none
            report = read_json(find_file(adapter, METRICS_NAME, revision))
    report = with_not_carried(report, config.not_carried)
    return FoldedLora(lora, weights, errors, origin, report, not_folded, getattr(base, "config", None), of)


def _besides(model: PeftModel, adapter_name: str) -> list[dict[str, str]]:
    """What a CAST adapter on a model has besides its kernels."""
    wrappers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    return [{"module": n, "what": SAVED} for n, m in wrappers.items() if adapter_name in m._adapters]


def _warn_of_experts(lora: LoraConfig, model: PeftModel) -> None:
    """Some mixtures of experts have dense MLPs besides, for which PEFT loads no LoRA: it takes them for experts."""
    seen = copy.copy(lora)
    convert_peft_config_for_transformers(seen, model.get_base_model(), None)
    if seen.target_parameters:
        moved = sorted(set(lora.target_modules) - set(seen.target_modules))
        warnings.warn(
            f"PEFT will not load this LoRA's weights for {', '.join(moved[:3])}{', ...' if len(moved) > 3 else ''}: "
            "it takes such names for experts of this model. Merge the CAST adapter (`merge_and_unload`), or serve it "
            "unfolded."
        )


def _load(adapter: str | Path, revision: str | None) -> PeftModel:
    config = read_adapter_config(adapter, revision)
    if not isinstance(config, CastConfig):
        raise ValueError(
            f"'{without_secrets(adapter)}' is of type {config.peft_type.value}, not a CAST adapter: there is nothing "
            "to fold."
        )
    check_weights(adapter, config, revision)
    name = config.base_model_name_or_path
    if (why := why_no_model(name) if name else "its `base_model_name_or_path` names none") is not None:
        raise ValueError(
            f"The configuration of the target model could not be read ({without_secrets(why)}): load the adapter on "
            "its model and pass the PeftModel."
        )
    try:
        with secrets_removed():
            values, _ = PretrainedConfig.get_config_dict(name, revision=config.revision)
            check_model_config(values, "its configuration")
            base = skeleton(AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=False))
    except Exception as error:  # a configuration's values can lead to anything in a model's code
        raise ValueError(
            f"The configuration of the target model '{without_secrets(name)}' could not be read ({one_line(error)}): "
            "load the adapter on its model and pass the PeftModel."
        ) from error
    try:
        return load_on_skeleton(base, adapter, "default", revision)
    except MemoryError:
        raise
    except Exception as error:  # PEFT raises whatever a wrong configuration leads to
        raise ValueError(
            f"The adapter '{without_secrets(adapter)}' does not fit its model '{without_secrets(name)}' "
            f"({one_line(error)}): get both again."
        ) from error


def _target_modules(factors: Mapping[str, tuple], base: torch.nn.Module) -> list[str]:
    """Last parts of the names where they say enough (`q_proj`), as servers expect them; else full names."""
    last = {name.rsplit(".", 1)[-1] for name in factors}
    meant = {name for name, _ in base.named_modules() if name.rsplit(".", 1)[-1] in last}
    return sorted(last) if meant == set(factors) else sorted(factors)


def _of_rank(A: torch.Tensor, B: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`B A` with A (R, in) and B (out, R) as factors of rank r, and the relative error of the product."""
    R = len(A)
    if R <= r:
        pad = torch.nn.functional.pad
        return pad(A, (0, 0, 0, r - R)), pad(B, (0, r - R)), 0.0
    # B A = Q_B (R_B R_Aᵀ) Q_Aᵀ: the singular values are those of the small product.
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    root = S[:r].sqrt()
    error = float(S[r:].norm() / S.norm().clamp_min(torch.finfo(S.dtype).tiny))
    return (root[:, None] * Vh[:r] @ Q_A.T).float(), (Q_B @ U[:, :r] * root).float(), error
