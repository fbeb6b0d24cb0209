"""The commands. Each reads its arguments, calls one function of the package and prints what it returned."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import datasets
import torch
import transformers
import typer
from rich.console import Console
from typer.core import TyperGroup

from .. import ranks, shards
from ..bridge import Bridge, fit_bridge
from ..evaluation import HarnessTask, evaluate
from ..fold import to_lora
from ..planning import DEVICES, Plan, plan
from ..report import write_report
from ..result import TranslationResult
from ..sharing import push
from ..translate import translate
from . import inspect as inspection
from .settings import arguments_for, dtype_of, read_config, read_prompts, read_settings, tasks_of


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        _results.set(sys.stdout)
        # Results alone go to stdout, so that they can be piped; Trainer and others print there too. Errors are met before
        # click turns Ctrl-C into "Aborted!" and the rest into tracebacks.
        with redirect_stdout(sys.stderr), _ending_well():
            return super().invoke(ctx)


app = typer.Typer(
    name="peft-cast",
    cls=_Commands,
    help="Keep LoRA adapters working on another language model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
err = Console(stderr=True, soft_wrap=True, highlight=False)
_results: ContextVar[TextIO] = ContextVar("results")

Source = Annotated[
    str, typer.Argument(help="Model the LoRA was trained on: hub id or folder; `-` takes it from the adapter.")
]
Adapter = Annotated[str, typer.Argument(help="The LoRA: hub id or folder.")]
Target = Annotated[str, typer.Argument(help="Model it shall work on: hub id or folder.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder that is written.")]
Text = Annotated[
    str | None,
    typer.Option(help="What the refinement reads: file, hub dataset id, `c4` or `self`.", rich_help_panel="Text"),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="File with a dozen prompts of the LoRA's kind, one per line (`\\n` for a line break): the models write more and answer them.",
        rich_help_panel="Text",
    ),
]
FitText = Annotated[
    str | None,
    typer.Option(
        help="General text for the closed form and the anchors; C4 if the models write the text.",
        rich_help_panel="Text",
    ),
]
Steps = Annotated[
    int | None, typer.Option(help="Refinement steps; 0 keeps the closed form.", rich_help_panel="Training")
]
BatchSize = Annotated[
    int | None, typer.Option(help="Texts per step, of all processes together.", rich_help_panel="Training")
]
LearningRate = Annotated[
    float | None, typer.Option(help="Peak step relative to each factor's size.", rich_help_panel="Training")
]
MaxLength = Annotated[int | None, typer.Option(help="Most tokens per text.", rich_help_panel="Training")]
Seed = Annotated[int | None, typer.Option(help="Seed of sampled text and training order.", rich_help_panel="Training")]
DeviceName = Annotated[
    str | None, typer.Option("--device", help="Where to work, e.g. `cuda:1`.", rich_help_panel="Training")
]
Dtype = Annotated[
    str | None, typer.Option(help="Precision of the models: bfloat16, float16, float32.", rich_help_panel="Training")
]
Config = Annotated[
    Path | None, typer.Option(help="YAML or JSON file with any arguments of the function; options override it.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any other argument of the function, `name=value`; may be repeated.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Revision = Annotated[str | None, typer.Option(help="Hub revision.")]


@app.command("translate")
def translate_command(
    source: Source,
    adapter: Adapter,
    target: Target,
    output: Output,
    text: Text = None,
    prompts: Prompts = None,
    fit_text: FitText = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    max_length: MaxLength = None,
    seed: Seed = None,
    device: DeviceName = None,
    dtype: Dtype = None,
    bridge: Annotated[str | None, typer.Option(help="A fitted bridge to start from.")] = None,
    config: Config = None,
    settings: Set = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in the output folder that was stopped, if there is one."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Translate a LoRA so that it works on another model.

    Prints what it will cost, then translates and saves the adapter. Example:

        peft-cast translate HuggingFaceTB/SmolLM2-135M-Instruct you/your-lora google/gemma-3-270m --prompts prompts.txt -o out
    """
    options = {
        "text": _text(text, prompts), "fit_text": fit_text, "steps": steps, "batch_size": batch_size, "seed": seed,
        "learning_rate": learning_rate, "max_length": max_length, "device": device, "dtype": dtype, "bridge": bridge,
    }  # fmt: skip
    arguments = arguments_for(translate, read_config(config) if config else {}, read_settings(settings or ()), options)
    models = (None if source == "-" else source, adapter, target)
    quiet = quiet or not ranks.is_main()
    _hush(quiet)
    if dry_run or not quiet:
        spread = shards.asked(arguments.get("training_args"))
        planned = _plan(models, arguments, processes=ranks.launched(), fsdp=spread)
        err.print(str(planned))
        if dry_run:
            return _print(planned.as_dict(), "", as_json)
        err.print(f"Translating {adapter} to {target}, into {output}\n")
    translated = translate(
        *models, progress=not quiet, **{"output_dir": output, "resume_from_checkpoint": resume, **arguments}
    )
    if not ranks.is_main():
        return
    result = cast(TranslationResult, translated)  # of one adapter
    _print(
        {"output": str(output), "metrics": result.metrics, "diagnosis": result.diagnosis()},
        f"{result}\nSaved in {output}; the report is {output / 'report.html'}",
        as_json,
        quiet,
    )


@app.command("plan")
def plan_command(
    source: Source,
    adapter: Adapter,
    target: Target,
    on: Annotated[
        str | None, typer.Option("--on", help=f"A device to plan for ({', '.join(DEVICES)}); this machine otherwise.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a text; the most when not given.")] = None,
    processes: Annotated[int, typer.Option(help="Devices that share the work; the plan is that of each.")] = 1,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="The models are spread over them.")] = False,
    config: Config = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Tell what a translation will cost: parameters, files, memory and time. Loads no model."""
    arguments = arguments_for(translate, read_config(config) if config else {}, read_settings(settings or ()))
    planned = _plan(
        (None if source == "-" else source, adapter, target),
        arguments,
        device=on,
        tokens=tokens,
        processes=processes,
        fsdp=fsdp,
    )
    _print(planned.as_dict(), str(planned), as_json)


@app.command("evaluate")
def evaluate_command(
    target: Target,
    adapters: Annotated[
        list[str], typer.Argument(help="Adapters as `name=folder or hub id`; a name given twice is two runs.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file; what it holds already is not measured again.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON file with `tasks`, a list of mappings with a `type`, and other arguments of `evaluate`."
        ),
    ] = None,
    harness: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, `arc_easy,hellaswag`.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows per harness task.")] = None,
    retrained: Annotated[
        str | None, typer.Option(help="Name of the adapter that was trained on the target: shows recovered lift.")
    ] = None,
    drift_text: Annotated[str | None, typer.Option(help="General text to measure drift on.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture that is drawn.")] = None,
    device: DeviceName = None,
    dtype: Dtype = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare adapters on a model: scores, recovered lift and drift."""
    _hush(quiet)
    runs: dict[str, list[str]] = {}
    for word in adapters:
        name, equals, folder = word.partition("=")
        if not equals:
            raise ValueError(f"An adapter is given as name=folder, got '{word}'.")
        runs.setdefault(name, []).append(folder)
    chosen = [HarnessTask(task.strip(), limit=limit) for task in harness.split(",")] if harness else []
    given = read_config(config) if config else {}
    chosen += tasks_of(given.pop("tasks", []))
    if not chosen:
        raise ValueError("There is nothing to evaluate on: pass `--harness`, or a `--config` with `tasks`.")
    arguments = arguments_for(
        evaluate,
        given,
        {"retrained": retrained, "drift_text": drift_text, "device": device, "dtype": dtype, "output": output},
    )
    found = evaluate(target, runs, chosen, progress=not quiet, **arguments)
    if plot:
        found.plot(plot)
    _print(found.to_dict(), str(found), as_json, quiet)


@app.command("bridge")
def bridge_command(
    source: Annotated[str, typer.Argument(help="Model that adapters come from.")],
    target: Target,
    output: Output,
    text: Text = None,
    samples: Annotated[int | None, typer.Option(help="How many texts are read.")] = None,
    device: DeviceName = None,
    dtype: Dtype = None,
    config: Config = None,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit the adapter-independent part of a model pair once, so that `cast` takes seconds."""
    arguments = arguments_for(
        fit_bridge, read_config(config) if config else {}, read_settings(settings or ()),
        {"text": text, "samples": samples, "device": device, "dtype": dtype},
    )  # fmt: skip
    _hush(quiet)
    bridge = fit_bridge(source, target, progress=not quiet and ranks.is_main(), **arguments)
    if not ranks.is_main():
        return
    bridge.save_pretrained(output)
    _print({"output": str(output), "metrics": bridge.metrics}, f"Bridge saved in {output}", as_json, quiet)


@app.command("cast")
def cast_command(
    bridge: Annotated[str, typer.Argument(help="A bridge: folder or hub id.")],
    adapter: Adapter,
    output: Output,
    gain: Annotated[float | None, typer.Option(help="Factor on the deltas.")] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the file.")] = "float32",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Carry a LoRA over a bridge: file to file, no model weights, no text, no training."""
    Bridge.from_pretrained(bridge).cast_file(adapter, output, gain=gain, dtype=dtype_of(dtype))
    _print({"output": str(output)}, f"CAST adapter saved in {output}", as_json, quiet)


@app.command("to-lora")
def to_lora_command(
    adapter: Annotated[str, typer.Argument(help="A CAST adapter: folder or hub id.")],
    output: Output,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA: padded exactly, or cut by SVD.")] = None,
    dtype: Annotated[str, typer.Option(help="Precision of its weights.")] = "float32",
    revision: Revision = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fold a CAST adapter into a plain LoRA, for vLLM and everything else that serves LoRAs."""
    folded = to_lora(adapter, rank, revision=revision, dtype=dtype_of(dtype))
    folded.save_pretrained(output)
    account = {"output": str(output), "rank": folded.config.r, "errors": folded.errors}
    _print(account, f"{folded}\nSaved in {output}", as_json, quiet)


@app.command("inspect")
def inspect_command(
    adapter: Annotated[str, typer.Argument(help="An adapter or bridge: folder or hub id.")],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Say what an adapter is, where it came from, which layers map to which, and its sizes."""
    account = inspection.inspect(adapter, revision)
    _print(account, inspection.describe(account), as_json)


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="A saved translation.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a translation's report (`report.html`, `report.md`) again."""
    page = write_report(folder)
    _print({"report": str(page)}, f"Report written to {page}", as_json, quiet)


@app.command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(help="What was saved: a CAST adapter, a folded LoRA or a bridge.")],
    repo_id: Annotated[str, typer.Argument(help="`user/name` on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Open a pull request instead.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Publish a saved folder on the Hugging Face Hub, with a model card. Log in with `hf auth login` first."""
    done = push(
        folder, repo_id, private=private or None, revision=revision, commit_message=message, create_pr=pull_request
    )
    account = {"repo_id": repo_id, "url": str(done.pr_url or done.commit_url)}
    _print(account, f"Pushed to {account['url']}", as_json, quiet)


def main() -> None:
    """Run a command. Exit codes: 0 done, 1 something that you can mend (one sentence on stderr), 2 a wrong option, 3 the loss
    became NaN or infinite, 130 interrupted."""
    app()


@contextmanager
def _ending_well() -> Iterator[None]:
    warnings.filterwarnings("ignore", module="torch|transformers|datasets")
    transformers.logging.set_verbosity_error()
    try:
        yield
    except KeyboardInterrupt as interrupt:
        err.print(f"\n{interrupt}" if interrupt.args else "\nInterrupted.", markup=False)
        sys.exit(130)
    except FloatingPointError as error:
        err.print(f"[red]Error[/red]  {error}", markup=True)
        sys.exit(3)
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        err.print("[red]Error[/red]  ", end="")
        err.print(str(error), markup=False)
        sys.exit(1)


def _hush(quiet: bool) -> None:
    """Without the bars of the libraries."""
    if quiet:
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def _text(text: str | None, prompts: Path | None) -> Any:
    if prompts is None:
        return text
    if text not in (None, "self"):
        raise ValueError("Pass `--text` or `--prompts`, not both: prompts are for text that the models write.")
    return {"self": {"prompts": list(read_prompts(prompts))}}


def _plan(models: tuple[str | None, str, str], arguments: dict[str, Any], **more: Any) -> Plan:
    known = signature(plan).parameters
    given = {name: value for name, value in arguments.items() if name in known and name not in ("device", "tokens")}
    source, adapter, target = models
    return plan(source, adapter, target, **given, **more)


def _print(account: dict[str, Any], text: str, as_json: bool, quiet: bool = False) -> None:
    stdout = _results.get()
    if as_json:
        stdout.write(json.dumps(account, indent=1, default=str) + "\n")
    elif text and not quiet:
        stdout.write(text + "\n")
