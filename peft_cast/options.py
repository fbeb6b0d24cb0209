"""Every option of a translation, declared once: name, default, bounds and meaning.

The arguments of `translate` and its like, the command line's flags, the keys of a config file, the tables in
docs/options.md, what a resumed run compares and what a model card lists are all read off these fields: a new option is
a new field.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .utils import values
from .utils.fields import Group, describe, option, unknown
from .utils.secrets import without_secrets


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Pairing(Group):
    """How the two models are loaded, where they work and how they are matched."""

    source_tokenizer: PreTrainedTokenizerBase | str | Path | None = option(
        None, "Tokenizer of the source, if it cannot be loaded from where the model comes from.", decides=False
    )
    target_tokenizer: PreTrainedTokenizerBase | str | Path | None = option(
        None, "Tokenizer of the target, likewise.", decides=False
    )
    source_revision: str | None = option(None, "Hub revision of the source model.", decides=False)
    adapter_revision: str | None = option(None, "Hub revision of the adapter.", decides=False)
    target_revision: str | None = option(None, "Hub revision of the target model.", decides=False)
    depth_map: str | Mapping[int, int] = option(
        "proportional",
        "Which target layer each source layer's part of the LoRA lands on. `proportional` keeps the relative depth; "
        "`similarity` is the order-keeping map of the largest linear CKA between hidden states; or a mapping of layer "
        "numbers.",
        check=values.depth_map,
    )
    module_map: Mapping[str, str] | None = option(
        None,
        "Source module to target module, such as `{fc1: up_proj}`, where the map that is found "
        "(`metrics['alignment']['routes']`) is not the one you want. Names are last parts, names within a layer, full "
        "names, roles (`q`, `up`, ...) or rows of a target module (`W_in[0:64]`). See docs/decoders.md.",
        check=values.module_map,
    )
    source_rank: int | float | None = option(
        None,
        "Rank to which the weight changes are cut of an adapter that is no plain LoRA, or the share of their squared "
        "singular values to keep. When not given: the exact rank up to 64, else 16 or twice the LoRA's, whichever is "
        "more.",
        check=values.source_rank,
    )
    device: str | torch.device | None = option(
        None,
        "Where to work: `cpu`, `cuda` or `mps`; when not given, the accelerator if there is one. Several processes "
        "have one each. Loaded models return to where they were.",
        everyday=True,
        decides=False,
    )
    source_device: str | torch.device | None = option(
        None, "Where the source works, if not there: a second GPU, or the CPU where memory is short.", decides=False
    )
    dtype: torch.dtype | None = option(
        None,
        "Precision of models that are loaded: bfloat16, float16, float32. When not given: bfloat16 where the hardware "
        "is fast at it (GPU, CPU with AMX or AVX512-BF16), else float32.",
        everyday=True,
        decides=False,
        check=values.dtype,
    )


@dataclass(frozen=True)
class Projections(Group):
    """What is trained around the LoRA's frozen matrices, its kernels; see `CastConfig`."""

    projection_type: Literal["compact", "factored", "full", "mlp"] | None = option(
        None,
        "`compact`, `factored` or `full` matrices, or `mlp`, factored with a nonlinear part. Compact when not given, "
        "factored if they are shared. docs/how-it-works.md has the maths.",
    )
    projection_size: int | None = option(None, "Inner size of the projections: the LoRA's rank when not given.")
    projection_bias: bool = option(
        False, "Whether projections have a bias. Such an adapter cannot be merged or folded."
    )
    projection_sharing: Literal["layer", "all"] | None = option(
        None, "`layer` or `all`: modules of a layer, or all, share the projections of equal shape."
    )

    def __post_init__(self) -> None:
        from .tuner import CastConfig

        super().__post_init__()
        given = {name: value for name, value in vars(self).items() if value is not None}
        CastConfig(**{"projection_type": "factored" if self.projection_sharing else "compact", **given})


@dataclass(frozen=True)
class Fit(Group):
    """The first maps between the models: the identity, or the closed form, from general text."""

    first_maps: Literal["auto", "copy", "closed_form"] = option(
        "auto",
        "`copy` puts the LoRA on the target as it is, where every module has the source's shape. `auto` does so where "
        "that alone brings the target at least half of the way to the teacher, as between versions of a model; else, "
        "and with `closed_form` always, the closed form is fitted.",
    )
    fit_text: Any = option(
        None,
        "General text for the closed form and the anchors: a file, a hub dataset id, a list of strings, or what else "
        "`text` may be. When not given: C4 if the models write `text` themselves, else `text`, and there are no "
        "anchors.",
        everyday=True,
    )
    fit_samples: int = option(64, "Texts for the closed form.", everyday=True, least=2)
    ridge: float | None = option(
        None, "Ridge strength of the closed form's regressions; chosen on held-out text when not given.", above=0
    )
    gain: float | None = option(
        None,
        "Factor on what the closed form adds to the target. A regression that explains little shrinks, so when not "
        "given each kernel is scaled by 1/√R² of its output projection, at most 2.",
        above=0,
    )


@dataclass(frozen=True)
class Training(Group):
    """The refinement: `alpha T² KL(teacher ‖ student) + beta MSE(hidden) + gamma KL(target ‖ student on anchors)`."""

    steps: int = option(100, "Refinement steps; 0 keeps the first maps.", everyday=True, least=0)
    on_policy_steps: int = option(
        0,
        "Further steps on what the translated model answers itself. It answers the prompts of `text`, and learns from "
        "the adapted source how to go on from its own words, at half the learning rate (arXiv 2306.13649). Costs a "
        "little likelihood and makes generation better (docs/text.md).",
        everyday=True,
        least=0,
    )
    batch_size: int = option(8, "Texts per step, of all processes together.", everyday=True, least=1)
    learning_rate: float = option(
        0.2,
        "Peak step of AdamW relative to the size (root mean square) of each factor. It is reached after a fifth of "
        "the steps, at most 10, and then decays linearly to 0.",
        everyday=True,
        above=0,
    )
    max_length: int = option(
        256, "Most tokens per text, in either model. Longer texts are cut.", everyday=True, least=2
    )
    seed: int = option(0, "Seed of the sampled text and of the training order.", everyday=True, check=values.seed)
    eval_samples: int = option(
        16, "Texts kept out of the refinement, to measure the distance to the teacher on.", least=1
    )
    alpha: float = option(1.0, "Weight of the KL divergence from the teacher.", least=0)
    beta: float = option(
        0.0,
        "Weight of the MSE between hidden states, normalized per layer. 0 skips it. On the one pair it was tried on "
        "it lowered the recovered lift, from 0.874 to 0.854 (docs/results.md).",
        least=0,
    )
    gamma: float | None = option(
        None,
        "Weight of the KL divergence from the untouched target on anchors, by default 1, 3 with a survey. They are "
        "documents of `fit_text` that the closed form has not read, one for every four texts, at most 512, and keep "
        "the target as it is on general text. 0 skips them.",
        least=0,
    )
    temperature: float = option(1.0, "Temperature T of the KL divergence.", above=0)
    teacher: Literal["auto", "source", "shown", "delta"] | float = option(
        "auto",
        "`source` imitates the adapted source model. `shown`, for a target that is the better model, imitates the "
        "target itself as it answers when it is shown three of the adapted source's answers: their form and its own "
        "knowledge. `delta` adds only what the LoRA changes to the target's own prediction; a number from 0 "
        "(`source`) to 1 (`delta`) mixes them (docs/results.md). `auto` takes `shown` where the target is clearly the "
        "stronger on the text's prompts, `delta` where a survey finds nothing that the adapter does, else `source`.",
        check=values.teacher,
    )
    enough: float = option(
        0.98,
        "Share of the way to the teacher from which the first maps are left as they are; 1 refines in any case.",
        least=0,
    )
    teacher_top_k: int | None = option(
        128,
        "How many of its likeliest tokens are kept of each of the teacher's predictions, with the mass of all others. "
        "They are made once per text. `None` makes them anew in every epoch and compares the whole vocabulary.",
        least=0,
    )
    training_args: Mapping[str, Any] | None = option(
        None,
        "Further `transformers.TrainingArguments`, which take precedence (gradient accumulation, bf16, logging, "
        "save_steps, ...). `{fsdp: true}`, as `accelerate launch --use_fsdp`, and DeepSpeed's ZeRO-3 shard both "
        "models over the processes.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher == "shown" and self.beta:
            raise ValueError(
                "The teacher `shown` has no hidden states of a source, which `beta` compares: pass `beta=0`."
            )
        if (self.steps or self.on_policy_steps) and not (self.alpha or self.beta or self.anchor_weight):
            raise ValueError(
                "With `alpha`, `beta` and `gamma` 0 nothing is learned: leave one above 0, or `steps` at 0."
            )
        if self.training_args:
            from .utils.arguments import check_training_args

            check_training_args(self.training_args)

    @property
    def anchor_weight(self) -> float:
        """`gamma`; 1 where it is left open, until it is known who writes the text."""
        return 1.0 if self.gamma is None else self.gamma

    @property
    def target_share(self) -> float:
        """Share of the target's own prediction in the adapted source's: the number given, 1 for `"delta"`, else 0."""
        return float(self.teacher == "delta") if isinstance(self.teacher, str) else float(self.teacher)


@dataclass(frozen=True)
class Run(Group):
    """What is kept, shown and gone on with."""

    output_dir: str | Path | None = option(
        None,
        "Folder for checkpoints and the finished adapter; nothing is written when not given. Several adapters get "
        "subfolders of their names.",
        decides=False,
    )
    resume_from_checkpoint: bool = option(
        False,
        "Go on with the run in `output_dir` that was stopped, if there is one, to the same result as if it had not "
        "been (docs/resuming.md).",
        decides=False,
    )
    save_dtype: torch.dtype | None = option(
        None,
        "Precision of the saved adapter: bfloat16, float16, float32. When not given that of the source LoRA's file "
        "(float32 for an adapter in memory that is in float32, as PEFT loads them). It is trained in float32 in any "
        "case.",
        decides=False,
        check=values.dtype,
    )
    cache_dir: str | Path | None = option(
        None,
        "Folder where the closed form and the teacher's predictions are kept for further runs on the same models, "
        "adapter and text, for instance with other steps or losses.",
        decides=False,
    )
    report_samples: int = option(
        2,
        "How many held-out texts the report quotes: continued by the target without and with the adapter, and those "
        "that excite the adapter most and least. Quotes stay beside the adapter and are never pushed; 0 for none.",
        decides=False,
        least=0,
    )
    report_similarity: bool = option(True, "Whether the report compares the layers of the two models.", decides=False)
    progress: bool = option(True, "Show progress bars.", decides=False)

    def __post_init__(self) -> None:
        from .utils import as_place

        super().__post_init__()
        for name in ("output_dir", "cache_dir"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_place(given, name))


GROUPS: dict[str, type[Group]] = {
    "pairing": Pairing,
    "projections": Projections,
    "fit": Fit,
    "training": Training,
    "run": Run,
}


@dataclass(frozen=True)
class Options:
    """All groups together, as the package passes them around."""

    pairing: Pairing = field(default_factory=Pairing)
    projections: Projections = field(default_factory=Projections)
    fit: Fit = field(default_factory=Fit)
    training: Training = field(default_factory=Training)
    run: Run = field(default_factory=Run)

    @classmethod
    def of(cls, flat: Mapping[str, Any], takes: Callable | None = None, **groups: Group | None) -> Options:
        """From groups, and from options by their own names, which go before.

        Args:
            flat: Options by name, as `generate` takes those of a `GenerationConfig`.
            takes: The function whose options they are; `None` for one that takes all.
            groups: By the names in `GROUPS`; `None` counts as not given.

        Raises:
            TypeError: If there is no such option.
            ValueError: If a value cannot be used; the message says what it may be.
        """
        known = names_taken(takes)
        for name in flat:
            if name not in known:
                function = takes.__name__ if takes is not None else "translate"
                raise TypeError(f"`{function}` has no argument '{name}': {unknown(name, list(known))}")
        made: dict[str, Any] = {}
        for group, kind in GROUPS.items():
            given = groups.get(group)
            if given is not None and not isinstance(given, kind):
                raise TypeError(f"`{group}` must be a `{kind.__name__}`, got {type(given).__name__}.")
            own = {name: value for name, value in flat.items() if name in kind.__dataclass_fields__}
            made[group] = dataclasses.replace(given or kind(), **own) if own or given is None else given
        return cls(**made)

    def values(self) -> dict[str, Any]:
        """All options by name."""
        return {name: value for group in GROUPS for name, value in vars(getattr(self, group)).items()}

    def deciding(self) -> dict[str, Any]:
        """Those on which the result depends."""
        decide = {one.name for _, one in all_options() if one.metadata["decides"]}
        return {name: value for name, value in self.values().items() if name in decide}

    def settings(self) -> dict[str, Any]:
        """Those on which the result depends, JSON-ready, without secrets: what metrics, reports and cards show."""
        return {
            name: json.loads(without_secrets(json.dumps(describe(value)))) for name, value in self.deciding().items()
        }

    def but(self, **changed: Any) -> Options:
        """These options with others in some places."""
        return Options.of(changed, **{group: getattr(self, group) for group in GROUPS})


# The options of the functions that are commands too, whose flags are made before the functions are imported.
OF_COMMANDS = {
    "plan": "source_revision adapter_revision target_revision depth_map module_map source_rank dtype projection_type "
    "projection_size projection_bias projection_sharing fit_samples steps on_policy_steps batch_size max_length "
    "eval_samples gamma teacher teacher_top_k training_args",
    "probe": "source_tokenizer source_revision adapter_revision source_rank device dtype fit_text seed progress",
    "evaluate": "target_tokenizer target_revision device dtype progress",
    "fit_bridge": "source_tokenizer target_tokenizer source_revision target_revision depth_map module_map device "
    "source_device dtype ridge batch_size max_length progress",
}


def takes(names: str) -> Callable[[Callable], Callable]:
    """Note that a function reads these options alone, named in one text; of a group it leaves the others unread."""

    def note(function: Callable) -> Callable:
        function.options_taken = names.split()  # type: ignore[attr-defined]
        return function

    return note


def names_taken(function: Callable | str | None) -> dict[str, dataclasses.Field]:
    """The options that a function, or one of its name, takes, by name; all for `None` and for `translate`."""
    known = {one.name: one for _, one in all_options()}
    if isinstance(function, str):
        return {name: known[name] for name in (OF_COMMANDS[function].split() if function in OF_COMMANDS else known)}
    return {name: known[name] for name in getattr(function, "options_taken", known)}


def all_options() -> Iterator[tuple[str, dataclasses.Field]]:
    """The name of its group and the field of every option."""
    for group, kind in GROUPS.items():
        yield from ((group, one) for one in fields(kind))  # type: ignore[arg-type]


def table() -> str:
    """The options as markdown, a table for each group: what docs/options.md holds."""
    parts = []
    for group, kind in GROUPS.items():
        rows = ["| option | default | meaning |", "|---|---|---|"]
        for one in fields(kind):  # type: ignore[arg-type]
            default = "" if one.default is None else f"`{one.default}`"
            rows.append(f"| `{one.name}` | {default} | {one.metadata['help']} |")
        parts.append(f"## `{group}`: {kind.__name__}\n\n{(kind.__doc__ or '').strip()}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"
