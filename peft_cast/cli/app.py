"""The commands. Each reads its arguments, calls one function of the package and prints what it returned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

import peft_cast

from .. import utils
from ..options import names_taken
from ..planning import DEVICES
from .console import Commands, hush, print_result, say
from .flags import with_flags
from .settings import arguments_for, dtype_of, read_config, read_prompts, read_settings, tasks_of


app = typer.Typer(
    name="peft-cast",
    cls=Commands,
    help="Keep LoRA adapters working on another language model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Source = Annotated[
    str, typer.Argument(help="Model the LoRA was trained on: hub id or folder; `-` takes it from the adapter.")
]
Adapter = Annotated[str, typer.Argument(help="The LoRA: hub id or folder.")]
Target = Annotated[str, typer.Argument(help="Model it shall work on: hub id or folder.")]
# As text: an empty word would become the current folder.
Output = Annotated[str, typer.Option("--output", "-o", metavar="PATH", help="Folder that is written.")]
Text = Annotated[
    str | None,
    typer.Option(
        help="What the refinement reads: file, hub dataset id, `c4`, `self` or `survey`, the default.",
        rich_help_panel="Text",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="File with a dozen prompts of the LoRA's kind, one per line (`\\n` for a line break). "
        "The models write more and answer them.",
        rich_help_panel="Text",
    ),
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


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-cast {peft_cast.__version__}")
        raise typer.Exit


@app.callback()
def peft_cast_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keep LoRA adapters working on another language model."""


@app.command("translate")
@with_flags("translate")
def translate_command(
    source: Source,
    adapter: Adapter,
    target: Target,
    flags: dict[str, Any],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="PATH", help="Folder that is written; not needed with `--dry-run`."),
    ] = None,
    text: Text = None,
    prompts: Prompts = None,
    bridge: Annotated[str | None, typer.Option(help="A fitted bridge to start from.")] = None,
    start: Annotated[str | None, typer.Option(help="A translation of the same LoRA to go on from.")] = None,
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

        peft-cast translate HuggingFaceTB/SmolLM2-135M-Instruct you/your-lora google/gemma-3-270m --prompts prompts.txt
        -o out
    """
    from ..translate import Job

    if output is None and not dry_run:
        raise typer.BadParameter("pass the folder that is written, or --dry-run for the plan alone.", param_hint="-o")
    words = {"text": _text(text, prompts), "bridge": bridge, "start": start, **flags}
    arguments = arguments_for(peft_cast.translate, read_config(config), read_settings(settings), words)
    quiet = quiet or not utils.distributed.is_main_process()
    hush(quiet)
    arguments = {"output_dir": output, "resume_from_checkpoint": resume, "progress": not quiet, **arguments}
    models = (None if source == "-" else source, adapter, target)
    Job.of(*models, **arguments).check()
    if dry_run:
        planned = _plan(models, arguments, processes=utils.distributed.launched_processes())
        say(str(planned))
        return print_result(planned.as_dict(), "", as_json)
    if not quiet:
        try:
            say(str(_plan(models, arguments, processes=utils.distributed.launched_processes())))
        except Exception as error:  # what stands in a plan's way is but a note
            say(f"There is no plan of this translation, which goes on all the same: {utils.one_line(error)}")
        say(f"Translating {adapter} to {target}, into {output}\n")
    translated = peft_cast.translate(*models, **arguments)
    if not utils.distributed.is_main_process():
        return
    assert output is not None, "only a dry run has none"
    result = cast(peft_cast.TranslationResult, translated)  # of one adapter
    print_result(
        {"output": str(output), "metrics": result.metrics, "diagnosis": result.diagnosis()},
        f"{result}\nSaved in {output}; the report is {Path(output) / 'report.html'}",
        as_json,
        quiet,
    )


@app.command("plan")
@with_flags("plan")
def plan_command(
    source: Source,
    adapter: Adapter,
    target: Target,
    flags: dict[str, Any],
    on: Annotated[
        str | None, typer.Option("--on", help=f"A device to plan for ({', '.join(DEVICES)}); this machine otherwise.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a text; the most when not given.")] = None,
    processes: Annotated[int, typer.Option(help="Devices that share the work; the plan is that of each.")] = 1,
    weight_bits: Annotated[int | None, typer.Option(help="Of models that are loaded quantized.")] = None,
    config: Config = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Tell what a translation will cost: parameters, files, memory and time. Loads no model."""
    arguments = arguments_for(peft_cast.translate, read_config(config), read_settings(settings), flags)
    models = (None if source == "-" else source, adapter, target)
    planned = _plan(models, arguments, on=on, tokens=tokens, processes=processes, weight_bits=weight_bits)
    print_result(planned.as_dict(), str(planned), as_json)


@app.command("probe")
@with_flags("probe")
def probe_command(
    source: Source,
    adapter: Adapter,
    flags: dict[str, Any],
    prompts: Annotated[
        Path | None, typer.Option(help="File with prompts to ask instead, one per line (`\\n` for a line break).")
    ] = None,
    config: Config = None,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Say what an unknown LoRA does: the kinds of prompts it acts on, and its answers beside the plain model's."""
    arguments = arguments_for(peft_cast.probe, read_config(config), read_settings(settings), flags)
    hush(quiet)
    given = None if prompts is None else read_prompts(prompts)
    found = peft_cast.probe(
        None if source == "-" else source, adapter, prompts=given, **{"progress": not quiet, **arguments}
    )
    print_result(found.as_dict(), str(found), as_json)


@app.command("evaluate")
@with_flags("evaluate")
def evaluate_command(
    target: Target,
    adapters: Annotated[
        list[str], typer.Argument(help="Adapters as `name=folder or hub id`; a name given twice is two runs.")
    ],
    flags: dict[str, Any],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="PATH", help="JSON file; what it holds already is not measured again."),
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
    plot: Annotated[str | None, typer.Option(metavar="PATH", help="Picture that is drawn.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare adapters on a model: scores, recovered lift and drift."""
    hush(quiet)
    runs: dict[str, list[str]] = {}
    for word in adapters:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"An adapter is given as name=folder, got '{word}'.")
        runs.setdefault(name, []).append(folder)
    chosen = [peft_cast.HarnessTask(task.strip(), limit=limit) for task in harness.split(",")] if harness else []
    given = read_config(config)
    chosen += tasks_of(given.pop("tasks", []))
    if not chosen:
        raise ValueError("There is nothing to evaluate on: pass `--harness`, or a `--config` with `tasks`.")
    arguments = arguments_for(
        peft_cast.evaluate, given, {"retrained": retrained, "drift_text": drift_text, "output": output, **flags}
    )
    if plot is not None:
        utils.check_output(plot, "plot")
        if not arguments.get("retrained"):
            raise ValueError("There would be no recovered lift to plot: name the `--retrained` adapter of the tasks.")
    found = peft_cast.evaluate(target, runs, chosen, progress=not quiet, **arguments)
    print_result(found.to_dict(), str(found), as_json, quiet)
    if plot is not None:
        found.plot(plot)


@app.command("bridge")
@with_flags("fit_bridge")
def bridge_command(
    source: Annotated[str, typer.Argument(help="Model that adapters come from.")],
    target: Target,
    output: Output,
    flags: dict[str, Any],
    text: Annotated[str | None, typer.Option(help="General text: file, hub dataset id or `c4`.")] = None,
    samples: Annotated[int | None, typer.Option(help="How many texts are read.")] = None,
    config: Config = None,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit the adapter-independent part of a model pair once, so that `cast` takes seconds."""
    arguments = arguments_for(
        peft_cast.fit_bridge, read_config(config), read_settings(settings), {"text": text, "samples": samples, **flags}
    )
    hush(quiet)
    utils.check_place(output, source, target, kind=None)
    shown = {"progress": not quiet and utils.distributed.is_main_process()}
    bridge = peft_cast.fit_bridge(source, target, **{**shown, **arguments})
    if not utils.distributed.is_main_process():
        return
    bridge.save_pretrained(output)
    print_result({"output": str(output), "metrics": bridge.metrics}, f"Bridge saved in {output}", as_json, quiet)


@app.command("cast")
def cast_command(
    bridge: Annotated[str, typer.Argument(help="A bridge: folder or hub id.")],
    adapter: Adapter,
    output: Output,
    gain: Annotated[float | None, typer.Option(help="Factor on the deltas.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of the file; the LoRA's own when not given.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Carry a LoRA over a bridge: file to file, no model weights, no text, no training."""
    from ..source import check_is_read

    bridge, adapter = utils.as_path(bridge), utils.as_path(adapter)
    utils.check_place(output, bridge, adapter)
    over = peft_cast.Bridge.from_pretrained(bridge)
    models = f"{over.source.name} {adapter} {over.target.name}"
    remedy = f"use `peft-cast translate {models} --bridge {bridge} --steps 0 -o {output}`"
    check_is_read(adapter, remedy=remedy, source=over.source.name)
    held = over.cast_file(adapter, output, gain=gain, dtype=None if dtype is None else dtype_of(dtype))
    account = {"output": str(output), "not_carried": held.not_carried, "holdings": held.as_dict()}
    print_result(account, "\n".join([*held.lines(), f"CAST adapter saved in {output}"]), as_json, quiet)


@app.command("to-lora")
def to_lora_command(
    adapter: Annotated[str, typer.Argument(help="A CAST adapter: folder or hub id.")],
    output: Output,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA: padded exactly, or cut by SVD.")] = None,
    format: Annotated[
        str,
        typer.Option(help="`peft`, a folder; `gguf`, a file for llama.cpp and Ollama; `mlx`, a folder for mlx-lm."),
    ] = "peft",
    dtype: Annotated[str, typer.Option(help="Precision of its weights.")] = "float32",
    revision: Revision = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fold a CAST adapter into a plain LoRA, for vLLM, llama.cpp and everything else that serves LoRAs."""
    from ..results import FORMATS, check_formats

    (format,) = check_formats([format])
    check, save = FORMATS[format]
    if format == "peft":
        utils.check_place(output, adapter, kind="LORA")
    else:
        check(output)
    folded = peft_cast.to_lora(adapter, rank, revision=revision, dtype=dtype_of(dtype))
    save(folded, output)
    account = {"output": str(output), "format": format, "rank": folded.config.r, "errors": folded.errors}
    account |= {"not_carried": folded.not_carried, "not_folded": list(folded.not_folded)}
    print_result(account, f"{folded}\nSaved in {output}", as_json, quiet)


@app.command("inspect")
def inspect_command(
    adapter: Annotated[str, typer.Argument(help="An adapter or bridge: folder or hub id.")],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Say what an adapter is, where it came from, which layers map to which, and its sizes."""
    from . import inspect as inspection

    account = inspection.inspect(adapter, revision)
    print_result(account, inspection.describe(account), as_json)


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="A saved translation.")], quiet: Quiet = False, as_json: Json = False
) -> None:
    """Write a translation's report (`report.html`, `report.md`) again."""
    page = peft_cast.write_report(folder)
    print_result({"report": str(page)}, f"Report written to {page}", as_json, quiet)


@app.command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(help="What was saved: a CAST adapter, a folded LoRA or a bridge.")],
    repo_id: Annotated[str, typer.Argument(help="`user/name` on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Open a pull request instead.")] = False,
    formats: Annotated[
        str | None, typer.Option(help="Fold a CAST adapter first and put the LoRA beside it: `peft,gguf,mlx`.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Publish a saved folder on the Hugging Face Hub, with a model card. Log in with `hf auth login` first."""
    if formats is not None:
        from ..results import fold_beside

        fold_beside(folder, formats)
    done = peft_cast.push(
        folder, repo_id, private=private or None, revision=revision, commit_message=message, create_pr=pull_request
    )
    account = {"repo_id": repo_id, "url": str(done.pr_url or done.commit_url)}
    print_result(account, f"Pushed to {account['url']}", as_json, quiet)


def main() -> None:
    """Run a command. Exit codes: 0 done, 1 something that you can mend (one sentence on stderr), 2 a wrong option, 3
    the loss became NaN or infinite, 130 interrupted."""
    app()


def _text(text: str | None, prompts: Path | None) -> Any:
    if prompts is None:
        return text
    if text not in (None, "self"):
        raise ValueError("Pass `--text` or `--prompts`, not both: prompts are for text that the models write.")
    from ..text import ENOUGH_PROMPTS

    given = list(read_prompts(prompts))
    return {"survey" if len(given) < ENOUGH_PROMPTS else "self": {"prompts": given}}


def _plan(models: tuple[str | None, str, str], arguments: dict[str, Any], **more: Any) -> peft_cast.Plan:
    known = {*names_taken("plan"), "text", "bridge", "start"}
    return peft_cast.plan(*models, **{name: value for name, value in arguments.items() if name in known}, **more)
