"""The report of a translation: every part exactly where its data is, nothing that others wrote taken as markup."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch
from conftest import ROOT, c4_texts
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast.align.tokens import align_texts
from peft_cast.evaluation.gather import describe, prompt_end, quote
from peft_cast.results.report.contents import contents, verdict
from peft_cast.results.report.figures import color, curve, heat_map, ticks_up_to
from peft_cast.results.report.markdown import to_markdown
from peft_cast.results.report.page import to_html
from peft_cast.results.report.redact import redact
from peft_cast.results.rows import Evaluation, Measurement
from peft_cast.text.samples import TextSample
from peft_cast.text.written import SelfWritten


RUN = ROOT / "docs" / "figures" / "run_smollm2-gemma3_gsm8k_all_CAST_seed0.json"
VOID = {"meta", "link", "br"}  # figures close all of theirs
SECTIONS = {
    "advice",
    "tasks",
    "kl",
    "samples",
    "excitement",
    "curves",
    "similarity",
    "fit",
    "landing",
    "costs",
    "settings",
}
TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zC1e"
HOSTILE = f'<script>alert("x")</script> ](javascript:alert) {{{{ 123457 * 8 }}}} `` ``` | {TOKEN} & \x00 \ud800 </svg>'


class Page(HTMLParser):
    """Tags must nest; sections, addresses, scripts and the text are noted."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.sections, self.addresses, self.tags, self.text = [], [], [], [], ""
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        if tag == "section":
            self.sections.append(attrs["id"])
        self.addresses += [attrs[name] for name in ("src", "href", "data", "action", "xlink:href") if name in attrs]
        assert not [name for name in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def result(source_folder, lora_folder, target_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_cast.models.loading.default_dtype", lambda device: torch.float32)
        return peft_cast.translate(
            source_folder,
            lora_folder,
            target_folder,
            text=c4_texts(60),
            fit_text=c4_texts(90)[60:],
            steps=10,
            beta=0.1,
            fit_samples=12,
            eval_samples=6,
            max_length=64,
            progress=False,
        )


@pytest.fixture
def metrics(result):
    return json.loads(json.dumps(result.metrics))  # as it is read again, and everybody's own


def evaluation(adapter="translated"):
    scores = {"base": (0.2, None), adapter: (0.5, 0.01), "retrained": (0.6, 0.2)}
    found = [Measurement(name, 0, "maths", "exact_match", True, {"exact_match": s}) for name, (s, _) in scores.items()]
    found += [Measurement(name, 0, "drift", "drift", False, {"drift": d}) for name, (_, d) in scores.items() if d]
    return Evaluation(tuple(found), {"maths": "retrained"}, {})


def sections(metrics, history=(), **options):
    return set(Page(to_html(contents(metrics, history, **options))).sections)


def test_a_saved_translation_has_its_report_beside_it(result, tmp_path):
    result.save_pretrained(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = Page(page)
    assert set(parsed.sections) == SECTIONS - {"tasks"}
    covered = 1 - result.metrics["kl"]["translated"] / result.metrics["kl"]["target"]
    assert f"{covered:.0%} of the way" in parsed.text
    # Everything is in the file.
    assert not parsed.addresses and "@import" not in page and "url(" not in page and "script" not in parsed.tags
    assert (tmp_path / "report.md").read_text(encoding="utf-8").startswith("# tiny-lora: tiny-llama → tiny-gemma3")


def test_an_evaluation_is_added_to_the_report_of_a_saved_folder(result, tmp_path):
    result.save_pretrained(tmp_path / "saved")
    file = peft_cast.write_report(tmp_path / "saved", evaluation=evaluation())
    assert file == tmp_path / "saved" / "report.html"
    parsed = Page(file.read_text(encoding="utf-8"))
    assert set(parsed.sections) == SECTIONS
    assert "recovers 0.75 of the lift on maths" in parsed.text
    summary = file.with_suffix(".md").read_text(encoding="utf-8")
    assert "| translated | 0.500 | 0.75 | 0.010 |" in summary
    elsewhere = peft_cast.write_report(result, tmp_path / "new" / "folder")
    assert set(Page(elsewhere.read_text(encoding="utf-8")).sections) == SECTIONS - {"tasks"}


def test_flips_stand_in_the_verdict_and_in_the_report(result, tmp_path):
    each = {"base": (1.0, 1.0, 0.0, 0.0), "translated": (1.0, 0.0, 1.0, 1.0)}
    found = [
        Measurement(n, 0, "sums", "exact_match", True, {"exact_match": sum(e) / 4}, (), e) for n, e in each.items()
    ]
    file = peft_cast.write_report(result, tmp_path, evaluation=Evaluation(tuple(found), {}, {}))
    summary = file.with_suffix(".md").read_text(encoding="utf-8")
    for text in (summary, Page(file.read_text(encoding="utf-8")).text):
        assert "On sums it turns 2 of 4 items right and 1 wrong" in text
    assert "| translated | sums | +0.250 ± 0.938 | 2 | 1 | base |" in summary


def test_lift_is_not_claimed_when_it_is_unclear_whose_it_is():
    kl = {"kl": {"target": 1.0, "translated": 0.5}}
    assert "0.75 of the lift" in verdict(kl, evaluation("any name"))
    two = evaluation("one")
    other = Measurement("two", 0, "maths", "exact_match", True, {"exact_match": 0.3})
    assert "lift" not in verdict(kl, dataclasses.replace(two, measurements=(*two.measurements, other)))


@pytest.mark.parametrize(
    ("target", "translated", "words"),
    [
        (1.0, 0.05, "Nearly all of it"),
        (1.0, 0.3, "Most of it"),
        (1.0, 0.7, "A part of it"),
        (1.0, 0.9, "Little of it"),
        (1.0, 1.2, "led away"),
        (0.0, 0.0, "nothing to translate"),
        (1.0, float("nan"), "failed"),
        (float("inf"), 1.0, "failed"),
    ],
)
def test_the_verdict_is_one_line_that_says_how_far_it_went(target, translated, words):
    line = verdict({"kl": {"target": target, "translated": translated}})
    assert words in line and "\n" not in line
    Page(to_html(contents({"kl": {"target": target, "translated": translated}})))


@pytest.mark.parametrize(
    ("section", "path"),
    [
        ("samples", ("report", "samples")),
        ("excitement", ("report", "excitement")),
        ("similarity", ("report", "layer_similarity")),
        ("kl", ("kl",)),
        ("fit", ("closed_form",)),
        ("landing", ("alignment",)),
        ("costs", ("phases",)),
        ("advice", ("excitement",)),
    ],
)
def test_a_part_without_data_is_left_out(section, path, metrics, result):
    before = sections(metrics, result.history)
    *parents, last = path
    holder = metrics
    for key in parents:
        holder = holder[key]
    del holder[last]
    gone = before - sections(metrics, result.history)
    assert section in gone and gone <= {section, "advice"}  # advice is taken from several of them
    to_markdown(contents(metrics, result.history))


def test_curves_need_a_history(metrics, result):
    assert "curves" not in sections(metrics, []) and "curves" in sections(metrics, result.history)
    report = contents(metrics, result.history)
    assert [name for name, *_ in report.curves] == [
        "KL on the training text",
        "KL on the anchors",
        "MSE of hidden states",
    ]


def test_the_summary_says_in_plain_text_what_the_report_does(result, metrics):
    metrics["alignment"]["unmapped"] = [{"module": f"m.{i}", "what": "no place for 'gate'"} for i in range(3)]
    metrics["source"] |= {"not_carried": [{"module": "m", "what": "trained bias"}], "converted": {"m": 0.25}}
    metrics["on_policy"] = {"texts": 4, "kl": {"before": 0.5, "after": 0.25}}
    told = dataclasses.replace(result, metrics=metrics)
    summary, kl = told.summary(), metrics["kl"]
    for words in (
        f"untouched target {kl['target']:>27.4f}",
        f"way covered {1 - kl['translated'] / kl['target']:>32.0%}",
        f"trained parameters {metrics['parameters']['trained']:>25,}",
        "own answers to 4 prompts 0.5000, then 0.2500",
        f"Source adapter LORA, kernels of rank {metrics['source']['rank']}; 1 weight changes approximated",
        "mean relative error 0.25; not carried over: trained bias (m)",
        "Closed form, held-out R²",
        "q    self_attn.q_proj → self_attn.q_proj  × 3",
        "Found no place on the target: no place for 'gate' (m.0 and 2 more)",
        *(f"Note  {note}" for note in told.diagnosis()),
    ):
        assert words in summary
    assert re.search(r"Time  load \d+ s, ", summary) and "\\" not in summary
    assert len(dataclasses.replace(result, metrics={"kl": kl}).summary().splitlines()) > len(kl)  # next to nothing


def test_options_are_listed_once(metrics, result):
    assert [title for title, _ in contents(metrics).settings] == ["Options", "Text", "Machine and versions"]
    assert dict(contents(metrics).settings[0][1])["output_dir"] == "not given"
    del metrics["report"]["arguments"]
    assert dict(contents(metrics).settings[0][1])["rank"] == str(metrics["settings"]["rank"])


@pytest.mark.parametrize("settings", [{"temperature": 2.0}, {"loss": {"temperature": 2.0}}])  # of now, and of earlier
def test_a_log_at_another_temperature_is_not_compared_with_held_out_text(settings, metrics, result):
    assert contents(metrics, result.history).curves[0][2]
    metrics["settings"] = {"steps": 10, **settings}
    assert not contents(metrics, result.history).curves[0][2]


def test_metrics_of_an_older_version_still_make_a_report(tmp_path):
    saved = json.loads(RUN.read_text(encoding="utf-8"))
    for newer in ("report", "refinement", "alignment"):
        saved["metrics"].pop(newer, None)
    (tmp_path / "cast_metrics.json").write_text(json.dumps(saved), encoding="utf-8")
    page = peft_cast.write_report(tmp_path).read_text(encoding="utf-8")
    assert set(Page(page).sections) == {"advice", "kl", "curves", "fit", "costs", "settings"}
    kl = saved["metrics"]["kl"]
    assert f"{1 - kl['translated'] / kl['target']:.0%} of the way" in page


def test_next_to_nothing_still_makes_a_report(tmp_path):
    (tmp_path / "cast_metrics.json").write_text('{"metrics": {}}', encoding="utf-8")
    assert Page(peft_cast.write_report(tmp_path).read_text(encoding="utf-8")).sections == []
    assert (tmp_path / "report.md").stat().st_size > 0


@pytest.mark.parametrize("content", [None, "{", "[]", '{"metrics": 3}'])
def test_a_folder_without_metrics_is_one_clear_error(content, tmp_path):
    if content is not None:
        (tmp_path / "cast_metrics.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="could not be read.*pass the folder of an adapter that"):
        peft_cast.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_result_needs_a_folder(result):
    with pytest.raises(ValueError, match="needs the `folder`"):
        peft_cast.write_report(result)


def hostile(value):
    """The same structure with something hostile in every string."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, dict):
        # Names of modules and settings come from files as well; those the report looks up stay.
        return {key + HOSTILE * ("." in key): hostile(item) for key, item in value.items()}
    return [hostile(item) for item in value] if isinstance(value, list) else value


def hostile_report(metrics):
    metrics["settings"]["another.name"] = HOSTILE
    metrics["alignment"]["unmapped"] = [{"module": "m", "what": "w"}]
    metrics["source"]["not_carried"] = [{"module": "m", "what": "w"}]
    metrics = hostile(metrics)
    measured = evaluation("name" + HOSTILE)
    return contents(metrics, [], measured)


def test_hostile_text_is_shown_and_does_nothing_on_the_page(metrics):
    page = to_html(hostile_report(metrics))
    parsed = Page(page)
    assert set(parsed.sections) == SECTIONS - {"curves"}
    assert not {"script", "a", "img", "iframe"} & set(parsed.tags) and not parsed.addresses
    assert parsed.text.count('<script>alert("x")</script>') > 30  # shown, not run
    assert "{{ 123457 * 8 }}" in parsed.text and "987656" not in parsed.text
    assert TOKEN not in page and TOKEN[:12] not in page and "\x00" not in page
    page.encode("utf-8")


def test_hostile_text_is_shown_and_does_nothing_in_markdown(metrics):
    summary = to_markdown(hostile_report(metrics))
    assert TOKEN[:12] not in summary and "\x00" not in summary
    summary.encode("utf-8")
    fences = re.findall(r"^(`{3,})text\n(.*?)\n\1$", summary, flags=re.DOTALL | re.MULTILINE)
    assert len(fences) == 3 * len(metrics["report"]["samples"])
    assert all("<script>" in text for _, text in fences)  # within a block it is only text
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", summary, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside and "](javascript" not in outside and "{{" not in outside and "&lt;script" in outside
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in outside.splitlines() if line.startswith("| ")]
    assert widths and all(width >= 3 for width in widths)


def test_a_token_that_runs_through_several_marked_words_is_hidden(metrics):
    pieces = ["say ", *re.findall(".{1,5}", TOKEN), " now"]
    shown = {
        "mean": 1.0,
        "before": "",
        "pieces": pieces,
        "nats": [float(i % 3) for i in range(len(pieces))],
        "cut": False,
    }
    metrics["report"]["excitement"]["most"] = [shown]
    page = Page(to_html(contents(metrics)))
    assert TOKEN[:12] not in page.text and "say " in page.text and " now" in page.text


def test_figures_are_well_formed_and_described(metrics, result):
    figures = re.findall(r"<svg.*?</svg>", to_html(contents(metrics, result.history)), flags=re.DOTALL)
    assert len(figures) == 3 + 2 + 3  # curves, similarity and its scale, two fits and their scale
    for figure in figures:
        root = ET.fromstring(figure)
        assert root.get("role") == "img" and root.get("aria-label")
        width, height = float(root.get("width")), float(root.get("height"))
        for element in root.iter():
            for name, limit in (("x", width), ("y", height), ("cx", width), ("cy", height)):
                assert 0 <= float(element.get(name, 0)) <= limit
            if (element.get("transform") or "").startswith("rotate(-90"):
                half = 5.5 * len(element.text) / 2
                assert half <= float(element.get("y")) <= height - half
    for name in ("Similarity", "R²"):
        assert any(name in ET.fromstring(figure).get("aria-label") for figure in figures)


def test_the_chosen_depth_map_lies_on_its_cells(metrics):
    chosen = metrics["alignment"]["depth_map"]
    root = ET.fromstring(contents(metrics).similarity[0])
    namespace = "{http://www.w3.org/2000/svg}"
    cells = {}
    for rect in root.iter(namespace + "rect"):
        x, y, size = (float(rect.get(name)) for name in ("x", "y", "width"))
        source, target = rect[0].text.split(":")[0].split(", ")
        cells[source, target] = (x, x + size, y, y + size)
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(namespace + "circle")]
    assert len(cells) == 3 * 2 and len(circles) == len(chosen)
    for (x, y), (source, target) in zip(circles, sorted(chosen.items())):
        left, right, top, bottom = cells[source, str(target)]
        assert left < x < right and top < y < bottom


def test_figures_bear_what_is_not_a_number():
    figure = heat_map(
        [[float("nan"), None], [float("inf"), 0.5]], ["0", "1"], ["a", "b"], (0.0, 1.0), name="n", axes=("r", "c")
    )
    assert str(figure).count("<rect") == 1
    assert not contents({"kl": {"target": 1.0, "translated": 0.5}}, [{"step": 1, "kl": float("nan")}]).curves
    ET.fromstring(curve([(5, 0.0)], "flat"))
    many = heat_map(
        [[0.5] * 80] * 80, [str(i) for i in range(80)], [str(i) for i in range(80)], (0, 1), name="n", axes=("r", "c")
    )
    labels = [t for t in ET.fromstring(many).iter() if t.get("class") == "label"]
    assert len(labels) < 80  # those of both axes together, thinned out


def test_colors_grow_lighter_and_ticks_reach_the_top():
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (color(i / 20) for i in range(21))]
    assert lightness == sorted(lightness)
    for highest in (0.0007, 0.04, 1.0, 1.14, 37.0):
        ticks = ticks_up_to(highest)
        assert ticks[0] == 0 and ticks[-1] >= 0.999 * highest and 3 <= len(ticks) <= 6


def test_every_number_in_a_cell_is_in_contrast_to_its_color(metrics):
    def luminance(value: str) -> float:
        digits = value[1:] if len(value) == 7 else "".join(2 * digit for digit in value[1:])
        channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    values = [[i / 40 for i in range(41)]]
    figure = ET.fromstring(
        heat_map(values, ["0"], [str(i) for i in range(41)], (0, 1), name="n", axes=("r", "c"), numbers=True)
    )
    fills = [e.get("fill") for e in figure.iter() if e.tag.endswith("rect") or e.get("class") == "number"]
    for cell, text in zip(fills[::2], fills[1::2]):
        light, dark = sorted((luminance(cell), luminance(text)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_gathered_metrics_are_ready_for_json_and_complete(result, metrics):
    report = metrics["report"]
    assert report == result.metrics["report"]
    assert len(report["samples"]) == 2 and {"prompt", "untouched", "translated", "text"} == set(report["samples"][0])
    cka = report["layer_similarity"]["cka"]
    assert len(cka) == 3 and {len(row) for row in cka} == {2} and all(0 <= x <= 1.001 for row in cka for x in row)
    excitement = report["excitement"]
    assert len(excitement["by_text"]) == metrics["text"]["held_out"] == 6
    most, least = ([q["mean"] for q in excitement[end]] for end in ("most", "least"))
    assert most + least == sorted(most + least, reverse=True) and len(most) == len(least) == 2
    assert max(excitement["by_text"]) == pytest.approx(most[0]) and min(excitement["by_text"]) == pytest.approx(
        least[-1]
    )
    assert report["arguments"]["steps"] == 10 and report["arguments"]["text"] == "60 × str"
    assert report["environment"]["versions"]["torch"]
    assert not any(p.requires_grad for name, p in result.model.named_parameters() if "peft_cast" in name)


def test_samples_are_what_the_models_write(result, metrics, piece_tokenizer, target_folder):
    sample = metrics["report"]["samples"][0]
    ids = piece_tokenizer(sample["prompt"], return_tensors="pt")
    ids.pop("token_type_ids", None)
    plain = AutoModelForCausalLM.from_pretrained(target_folder)
    for model, name in ((plain, "untouched"), (result.model, "translated")):
        written = model.generate(**ids, do_sample=False, max_new_tokens=48, pad_token_id=piece_tokenizer.pad_token_id)
        text = piece_tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert redact(text) == sample[name]


def test_a_quote_is_the_text_and_its_marks_are_in_their_places(byte_tokenizer, piece_tokenizer):
    text = "Tom has 12 boxes of é and 🙂 toys."
    (pair,) = align_texts([text], byte_tokenizer, piece_tokenizer)
    nats = torch.zeros(len(pair.source_positions))
    marked = 5
    nats[marked] = 3.0
    quoted = quote(byte_tokenizer, pair, nats)
    assert quoted["before"] + "".join(quoted["pieces"]) == text and not quoted["cut"]
    # The piece that is marked is what was predicted at that position: it begins with the next token.
    begin = len(byte_tokenizer.decode(pair.source_ids[: pair.source_positions[marked] + 1]))
    assert text[begin:].startswith(quoted["pieces"][marked]) and quoted["nats"][marked] == 3.0
    long = align_texts([text * 20], byte_tokenizer, piece_tokenizer)[0]
    cut = quote(byte_tokenizer, long, torch.zeros(len(long.source_positions)))
    assert cut["cut"] and len(cut["pieces"]) == len(cut["nats"]) == 160


def test_a_sample_ends_where_theprompt_ends(byte_tokenizer, piece_tokenizer):
    prompt, answer = "Question: how many boxes are there on the long table?\nAnswer:", " there are seven boxes on it"
    with_prompt = align_texts(
        [answer], byte_tokenizer, piece_tokenizer, source_prompts=[prompt], target_prompts=[prompt]
    )[0]
    beginning = piece_tokenizer.decode(with_prompt.target_ids[: prompt_end(with_prompt)], skip_special_tokens=True)
    assert beginning == prompt
    without = align_texts([answer * 6], byte_tokenizer, piece_tokenizer)[0]
    assert 20 <= prompt_end(without) < len(without.target_ids) - 10
    short = align_texts(["seven boxes"], byte_tokenizer, piece_tokenizer)[0]
    assert 0 < prompt_end(short) <= len(short.target_ids)


def test_arguments_are_described_without_their_texts_and_tokens():
    assert describe(SelfWritten(prompts=["my secret prompt"], more_prompts=3))["prompts"] == "1 × str"
    assert describe([TextSample("a")] * 20) == "20 × TextSample"
    assert describe({"hub_token": TOKEN, "bf16": True}) == {"hub_token": "***", "bf16": True}
    assert describe(torch.float32) == "torch.float32" and describe({0: 1}) == {"0": 1}
    json.dumps(describe({"text": {"a": [object()] * 3}, "model": torch.nn.Linear(1, 1)}))


SMALL = {"steps": 0, "fit_samples": 6, "eval_samples": 3, "max_length": 40, "progress": False}


def test_no_text_leaves_the_machine_when_it_is_not_wanted(source_folder, lora_folder, target_folder, tmp_path):
    texts = [f"PRIVATE {text}" for text in c4_texts(12)]
    for options, quoted in ({}, True), ({"report_samples": 0, "report_similarity": False}, False):
        result = peft_cast.translate(source_folder, lora_folder, target_folder, text=texts, **options, **SMALL)
        result.save_pretrained(tmp_path)
        assert "PRIVATE" not in (tmp_path / "cast_metrics.json").read_text(encoding="utf-8")  # this one is published
        for file in ("cast_report.json", "report.html", "report.md"):
            assert ("PRIVATE" in (tmp_path / file).read_text(encoding="utf-8")) == quoted
    assert set(result.metrics["report"]) == {"models", "arguments", "environment", "excitement"}
    with pytest.raises(ValueError, match="`report_samples` must be at least 0"):
        peft_cast.translate(source_folder, lora_folder, target_folder, text=texts, report_samples=-1, **SMALL)


def test_a_report_that_fails_costs_no_translation(source_folder, lora_folder, target_folder, monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("peft_cast.evaluation.gather.continuations", fails)
    monkeypatch.setattr("peft_cast.evaluation.gather.layer_similarity", fails)
    with pytest.warns(UserWarning, match="The report goes without its (samples|layer similarity): out of memory"):
        result = peft_cast.translate(source_folder, lora_folder, target_folder, text=c4_texts(12), **SMALL)
    result.save_pretrained(tmp_path)
    found = Page((tmp_path / "report.html").read_text(encoding="utf-8")).sections
    assert "samples" not in found and "similarity" not in found and "excitement" in found
