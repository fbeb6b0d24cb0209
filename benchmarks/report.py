"""Put the committed measurements into README.md and docs/results.md, between their marks. Run after a benchmark or
demo.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import experiments
import setting

import peft_cast


ROOT = setting.HERE.parent
TITLES = {
    "smollm2-gemma3": "SmolLM2-135M-Instruct → Gemma-3-270m",
    "gemma3-smollm2": "Gemma-3-270m → SmolLM2-135M-Instruct",
    "same": "SmolLM2-135M-Instruct → itself",
}
TASKS = {
    "gsm8k": "GSM8K LoRA",
    "agnews": "AG News LoRA",
    "kinds": "WordNet kinds LoRA (never used in development)",
    "definitions": "WordNet definitions LoRA (never used in development)",
}


# Two sentences on each experiment, written after looking at it.
CONCLUSIONS = {
    "sharing": "Full matrices for each module, seventy times the parameters, are no better than thin ones of the "
    "LoRA's rank. Shared by the modules of a layer they carry as much with 37% of the parameters, but drift twice as "
    "far; one pair for all modules of a shape loses 20 points and ruins the target on general text (0.56 nats). Every "
    "module has its own, thin ones.",
    "steps": "The lift grows with every doubling, from 0.78 over 0.86 and 0.90 to 0.92, by less each time: the second "
    "hundred steps bring one point, of texts that are read four times by then. The closed form alone drifts by 0.008; "
    "of the trained ones the drift is least after 100 steps, 0.010. The default is 100; where the KL still falls at "
    "the end, the diagnosis says to pass more.",
    "nonlinear": "An MLP beside the linear map is a point and a half better after 50 steps, about as much as a larger "
    "step or inner size gains, and cannot be folded or merged; a bias gains nothing and drifts further. Linear "
    "without bias stays the default.",
    "text": "C4 as it stands shows nothing of this LoRA (the adapted source hardly differs from the plain one on it): "
    "it recovers nothing, and the target, which learns to write C4 as the smaller source would, drifts ten times as "
    "far as on text that the adapted source wrote to prompts of the LoRA's kind. Its snippets answered by the adapted "
    "source as chat carry over a tenth, at a fifth of that drift: better than C4, which is what `translate` reads "
    "when it is given nothing, but for a LoRA of one task nothing replaces prompts of its kind. These need not be "
    "real or many: 400 questions of the task's training set are no better than our sixteen, answered 26 times each, "
    "and what the target writes in their manner changes nothing here. Of the answers to their end, a temperature of "
    "0.7 is a point and a half ahead of 1; C4 in half of their places costs seven points and brings its drift.",
    "teacher": "On GSM8K, where the source with its LoRA is far better than the untouched target, imitating it "
    "outright is best by far: every step towards what the LoRA changes alone (`delta`) costs lift, although it drifts "
    "less. `source` stays the default; for smaller shares of the target's own see [what the teacher "
    "allows](#what-the-teacher-allows).",
    "loss": "The KL divergence alone is best. The hidden-state MSE on top of it costs two points and drifts further, "
    "and alone it ruins the target on the task, to worse than untouched: linear maps of hidden states do not carry "
    "what decides the next token. `beta` stays 0.",
    "depth_map": "The three maps are equal within the noise, so proportional, which costs nothing, stays. One kernel "
    "a module instead of one or two is as good with 60% of the parameters and a folded LoRA of half the rank; the "
    "closed form alone is weaker then (KL 1.112 from the teacher instead of 1.101).",
    "start": "After 50 steps it hardly matters how strongly the closed form is installed: a tenth of it ends one "
    "point behind, and scaling by the fit, the default, is ahead by less than the noise.",
    "anchor": "Anchors cost nothing on the task: the four lifts differ by less than their noise. Without them the "
    "target drifts by 0.15 nats per token, with the default of 1 by 0.011, so it stays.",
    "learning_rate": "Of the step sizes 0.03 is far too slow at this length, and 0.2 and 0.4 are ahead of 0.1 by more "
    "than one point of lift. 0.2 drifts least and is now the default; 0.4 gains 0.28 points more and is nearer to "
    "where an earlier session saw a run diverge.",
    "parametrization": "Compact projections, which train a LoRA's own factors on the target from the closed-form "
    "start, are a little ahead of factored ones at both step sizes, within the noise, with 57% of the parameters and "
    "less drift. They are the default; that the kernel stays in the path while training adds nothing for linear "
    "projections of one kernel.",
    "projection_size": "Every doubling of the inner size helps a little up to 4r, also the drift, and the "
    "projections' own parameters grow with it; r/4, two directions instead of eight, still carries 0.85. Full "
    "matrices, seventy times the parameters of size r, are no better than r/4 at this length, so thin projections of "
    "the LoRA's rank stay the default.",
}


def tables() -> str:
    """Every table with its plot and raw numbers."""
    parts = []
    for file in sorted(setting.FIGURES.glob("table_*.json")):
        pair, task, *modules = file.stem.removeprefix("table_").split("_")
        title = f"### {TITLES[pair]}, {TASKS[task]}" + (f" on {modules[0]}" if modules else "")
        plot = f"![recovered lift](figures/{file.stem}.png)"
        links = f"Raw: [figures/{file.name}](figures/{file.name})"
        own = setting.FIGURES / file.name.replace("table", "source", 1)
        if own.exists():
            scores = peft_cast.Evaluation.load(own)
            teacher = ", ".join(
                f"{row.task} {row.scores[0]:.3f}" for row in scores.rows if row.adapter == "source LoRA"
            )
            links += f". The source with its own LoRA: {teacher} ([raw](figures/{own.name}))"
        runs = sorted(setting.FIGURES.glob(f"run_{pair}_{task}_{modules[0] if modules else 'all'}_CAST_seed*.json"))
        links += "".join(f". {cost(run)}" for run in runs)
        evaluation = peft_cast.Evaluation.load(file)
        if card := evaluation.settings["environment"]["accelerator"]:
            links += f". Judged on an {card}"
        if earlier := evaluation.settings.get("earlier"):
            links += f". Made by earlier code, on text written then: {', '.join(earlier)}"
        parts.append(f"{title}\n\n{evaluation}\n\n{plot}\n\n{wrapped(links)}.")
    return "\n\n".join(parts)


def wrapped(text: str) -> str:
    """A paragraph in lines of at most 119 characters, whatever its links are."""
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def cost(run: Path) -> str:
    """What a translation took, apart from writing its text."""
    found = json.loads(run.read_text(encoding="utf-8"))
    phases = ", ".join(f"{name} {phase['seconds']:.0f} s" for name, phase in found["metrics"]["phases"].items())
    card = found["environment"]["accelerator"]
    seed = run.stem.rsplit("_", 1)[1].replace("seed", "Seed ") + (f" on an {card}" if card else "")
    return f"{seed}: {phases} ([raw](figures/{run.name}))"


def sweeps() -> str:
    """Every experiment of which all variants were run."""
    if not experiments.RESULTS.exists():
        return ""
    runs = json.loads(experiments.RESULTS.read_text(encoding="utf-8"))["runs"]
    parts = []
    for name, variants in experiments.EXPERIMENTS.items():
        keys = {v: experiments.key_of(o) for v, o in variants.items()}
        done = {v: runs[key] for v, key in keys.items() if key in runs}
        if len(done) < 2:
            continue
        lines = [f"### {name.replace('_', ' ').capitalize()}", ""]
        lines += ["| | nats per character | recovered lift | drift | excitement |", "|---|---|---|---|---|"]
        for variant, run in done.items():
            scores = [run["scores"][key] for key in ("nats_per_character", "recovered_lift", "drift")]
            lines.append(f"| {variant} | " + " | ".join(f"{s:.3f}" for s in [*scores, run["excitement"]]) + " |")
        if (setting.FIGURES / f"experiment_{name}.png").exists():
            lines += ["", f"![{name}](figures/experiment_{name}.png)"]
        if name in CONCLUSIONS:
            lines += ["", wrapped(CONCLUSIONS[name])]
        if len(done) < len(variants):
            lines += ["", f"Not run yet: {', '.join(v for v in variants if v not in done)}."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def demo() -> str:
    """The README's two tables."""
    found = json.loads((setting.FIGURES / "demo.json").read_text(encoding="utf-8"))
    settings, parameters = found["settings"], found["translation"]["parameters"]
    names = {
        "base": "Gemma-3-270m, untouched",
        "translated": "Gemma-3-270m with the translated LoRA",
        "retrained": "Gemma-3-270m with a LoRA retrained on it",
    }
    lines = [
        "The scores are on held-out GSM8K problems. *Nats per character* is the negative log-likelihood of "
        f"{settings['problems']} gold answers: lower is",
        f"better. *In GSM8K format* is the share of {settings['generate']} generated answers that end as GSM8K's do "
        "(`#### number`). [Recovered lift and",
        f"drift](docs/results.md#terms) are defined beside the results. This is one run, seed {found['seed']} ([raw "
        "numbers](docs/figures/demo.json)).",
        "",
        "| | nats per character | recovered lift | in GSM8K format | drift |",
        "|---|---|---|---|---|",
    ]
    for name, title in names.items():
        s = found["scores"][name]
        cells = f"{s['nats_per_character']:.3f} | {s['recovered_lift'] + 0:.2f} | {s['in_format']:.0%}"
        lines.append(f"| {title} | {cells} | {s.get('drift', 0.0):.3f} |")
    lines += [
        "",
        f"{parameters['trained']:,} parameters were trained (the source LoRA has {parameters['source_lora']:,}). What "
        "it cost on 2 CPU cores:",
        "",
        "| phase | seconds | peak memory (GiB) |",
        "|---|---|---|",
    ]
    for name, phase in {**found["phases"], **found["translation"]["phases"]}.items():
        lines.append(f"| `{name}` | {phase['seconds']:.0f} | {phase['peak_memory_mb'] / 1024:.1f} |")
    lines += [
        "",
        "`load` to `report` are the parts of `translate`. `models` is the one-time conversion of the two models, "
        "about a minute\nwhen it was not done before.",
    ]
    return "\n".join(lines)


def plans() -> str:
    """The plan beside what was measured, and what it says of models that do not fit here."""
    found = json.loads((setting.FIGURES / "plan.json").read_text(encoding="utf-8"))
    lines = [
        "| translation | phase | seconds, planned | measured | memory (MB), planned | measured |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["measured"]:
        numbers = (row[key] for key in ("planned_seconds", "seconds", "planned_mb", "mb"))
        lines.append(f"| {row['run']} | {row['phase']} | " + " | ".join(f"{number:.0f}" for number in numbers) + " |")
    lines += [
        "",
        "| plan | steps | closed form | refinement | memory (GiB) | groups of layers | fits |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, planned in found["elsewhere"].items():
        minutes = [f"{planned['phases'][phase]['seconds'] / 60:.0f} min" for phase in ("closed_form", "refine")]
        cells = [str(planned["assumed"]["steps"]), *minutes, f"{planned['memory'] / 2**30:.0f}"]
        cells += [str(planned["assumed"]["fit_groups"]), "yes" if planned["fits"] else "no"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed() -> str:
    """What each part costs beside the least it could cost."""
    found = json.loads((setting.FIGURES / "speed.json").read_text(encoding="utf-8"))
    lines = ["| | seconds | floor | ratio |", "|---|---|---|---|"]
    for name, cost in found.items():
        if "ratio" in cost:
            lines.append(f"| {name} | {cost['seconds']:.4f} | {cost['floor']:.4f} | {cost['ratio']:.2f} |")
    size = found["files"]
    share = {name: size[name] / size["source_lora"] for name in size}
    lines += [
        "",
        "File sizes, beside the source LoRA (bfloat16): " + ", ".join(f"{n} {s:.2f}" for n, s in share.items()) + ".",
    ]
    return "\n".join(lines)


def gpu() -> str:
    """What translations of 7B models and of the demo pair took on a GPU."""
    found = json.loads((setting.FIGURES / "gpu.json").read_text(encoding="utf-8"))
    rates = []
    lines = [
        "| pair | tokens a step | seconds a step | tokens a second | of the product rate | 1,000 steps (min) | closed "
        "form: texts | seconds | GiB | refinement: GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part, name in (("whole", "7B, bfloat16"), ("quantized", "7B, 4 bits"), ("demo", "demo, bfloat16")):
        for what, run in found[part].items():
            phases = run["phases"]
            rates.append(run["bfloat16_product_flops"] / 1e12)
            gib = {
                n: (phases[n]["peak_device_memory_mb"] - run.get("taken_mb", 0)) / 1024
                for n in ("closed_form", "refine")
            }
            lines.append(
                f"| {name}, {what} | {run['tokens_per_step']} | {run['seconds_per_step']:.2f} | "
                f"{run['tokens_per_second']:.0f} | {run['share_of_product_rate']:.0%} | "
                f"{run['minutes_for_1000_steps']:.1f} | {run['fit_samples']} | {phases['closed_form']['seconds']:.0f} "
                f"| {gib['closed_form']:.1f} | {gib['refine']:.1f} |"
            )
    lines += [
        "",
        f"{found['card']['name']}; a bfloat16 product of 8192³ reached {min(rates):.0f} to {max(rates):.0f} TFLOP/s "
        "on it.",
    ]
    return "\n".join(lines)


def spread_plan() -> str:
    """What each device of the recipe in docs/scale.md takes, by phase."""
    found = json.loads((setting.FIGURES / "plan.json").read_text(encoding="utf-8"))["elsewhere"]
    planned = found["Llama-2-7B to Llama-3-70B, each of eight H100"]
    lines = [
        f"| phase | time | memory of each GPU ({planned['device']['memory'] / 2**30:.0f} GiB) | of that above the "
        "weights |",
        "|---|---|---|---|",
    ]
    for name, phase in planned["phases"].items():
        cells = (
            f"{phase['seconds'] / 60:.0f} min",
            *(f"{phase[k] / 2**30:.0f} GiB" for k in ("memory", "above_weights")),
        )
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Groups of layers: {planned['assumed']['fit_groups']}."])


def scenarios() -> str:
    """What a stronger target makes of a translation, a table for each target and task."""
    parts = []
    for file in sorted(setting.FIGURES.glob("scenario_*.json")):
        target, task = file.stem.removeprefix("scenario_").rsplit("_", 1)
        runs = sorted(setting.FIGURES.glob(f"run_{file.stem}_*_seed*.json"))
        links = f"Raw: [figures/{file.name}](figures/{file.name})" + "".join(f". {cost(run)}" for run in runs)
        parts.append(f"### {target}, {TASKS[task]}\n\n{peft_cast.Evaluation.load(file)}\n\n{wrapped(links)}.")
    return "\n\n".join(parts)


def put(page: Path, mark: str, end: str, text: str) -> None:
    old = page.read_text(encoding="utf-8")
    new = re.sub(f"{mark}\n.*?{end}", lambda _: f"{mark}\n{text}\n{end}", old, flags=re.DOTALL)
    page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    results = ROOT / "docs" / "results.md"
    put(results, "<!-- tables -->", "<!-- end tables -->", tables())
    put(results, "<!-- experiments -->", "<!-- end experiments -->", sweeps())
    if (setting.FIGURES / "speed.json").exists():
        put(results, "<!-- speed -->", "<!-- end speed -->", speed())
    put(results, "<!-- gpu -->", "<!-- end gpu -->", gpu())
    if (setting.FIGURES / "plan.json").exists():
        put(ROOT / "docs" / "planning.md", "<!-- plan -->", "<!-- end plan -->", plans())
        put(ROOT / "docs" / "scale.md", "<!-- spread plan -->", "<!-- end spread plan -->", spread_plan())
    put(ROOT / "docs" / "upgrades.md", "<!-- scenarios -->", "<!-- end scenarios -->", scenarios())
    put(ROOT / "README.md", "<!-- figures -->", "<!-- end -->", demo())
