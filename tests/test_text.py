"""What is read as text."""

import copy
import json
from dataclasses import replace

import datasets
import pytest
import torch
from conftest import keep_in, tiny_model

from peft_cast.text import written
from peft_cast.text.corpus import Corpus, read_corpus
from peft_cast.text.mixture import Mixture, check_text, check_texts, read_text
from peft_cast.text.samples import TextSample
from peft_cast.text.survey import Survey
from peft_cast.text.written import SelfWritten, common_affixes, write_texts


TEXTS = [f"Text number {i}, which is long enough to be read by the corpus reader." for i in range(6)]


@pytest.fixture
def files(tmp_path):
    data = datasets.Dataset.from_dict({"text": TEXTS, "other": list(range(6))})
    data.to_json(tmp_path / "texts.jsonl")
    data.to_parquet(tmp_path / "texts.parquet")
    data.to_csv(tmp_path / "texts.csv")
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    for name in ("texts.jsonl", "texts.csv", "texts.txt"):  # as Windows saves them
        (tmp_path / name.upper()).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    return tmp_path


FILES = ["texts.jsonl", "texts.parquet", "texts.csv", "texts.txt", "saved", "TEXTS.JSONL", "TEXTS.CSV", "TEXTS.TXT"]


@pytest.mark.parametrize("name", FILES)
def test_local_files(files, name):
    assert read_corpus(str(files / name), 10) == TEXTS
    assert read_corpus(files / name, 2) == TEXTS[:2]


def test_text_in_memory():
    data = datasets.Dataset.from_dict({"text": TEXTS})
    assert read_corpus(TEXTS, 3) == TEXTS[:3]
    assert read_corpus((t for t in TEXTS), 3) == TEXTS[:3]
    assert read_corpus(data, 3) == read_corpus(data.to_iterable_dataset(), 3) == TEXTS[:3]


def test_streams_are_read_no_further_than_needed():
    def endless():
        while True:
            yield TEXTS[0]

    assert len(read_corpus(endless(), 5)) == 5


def test_column_and_minimum_length(files):
    rows = datasets.Dataset.from_dict({"body": ["short", *TEXTS]})
    assert read_corpus(Corpus(rows, column="body"), 10) == TEXTS
    assert read_corpus(Corpus(rows, column="body", min_chars=1), 10)[0] == "short"
    with pytest.raises(ValueError, match=r"no column 'text'; it has body: .*column="):
        read_corpus(rows, 1)


@pytest.mark.parametrize("corpus", ["allenai/c4", "user/some-dataset", Corpus("user/other", name="en")])
def test_offline_hub_dataset_is_one_clear_error(corpus):
    with pytest.raises(OSError, match=r"could not be reached.*pass text that is at hand as `text`: a .jsonl"):
        read_corpus(corpus, 1)


def test_offline_general_text_that_nobody_named_comes_with_the_package():
    with pytest.warns(UserWarning, match="the 20 of its documents that come with peft_cast are read as `fit_text`"):
        texts = read_corpus(None, 20, "fit_text")
    assert len(set(texts)) == 20 and min(map(len, texts)) >= 200


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], "holds no text of at least 50 characters"),
        (["too short"], "holds no text of at least 50 characters"),
        ([1, 2], "must hold strings, got int"),
        (7, "must be a hub id, a path, an iterable"),
        (b"bytes", "must be a hub id, a path, an iterable"),
        ("self", "`text`, 'self', is a word of the command line: pass `SelfWritten"),
        ("https://huggingface.co/datasets/a/b", "is a web address: pass the id of a dataset"),
        (
            Corpus(TEXTS, name="en"),
            "`name` is for datasets on the Hub, and the text corpus .list. is none: leave it out",
        ),
        ("The boats came home.\nLate.", "'The boats came home.…' is one string, .*pass a list of strings"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS})), r"splits \['train'\]"),
    ],
)
def test_unusable_text_is_one_clear_error(corpus, message):
    with pytest.raises(ValueError, match=message):
        read_corpus(corpus, 1)


def test_missing_and_corrupt_files_are_one_clear_error(tmp_path):
    with pytest.raises(OSError, match="does not exist"):
        read_corpus(str(tmp_path / "no.jsonl"), 1)
    (tmp_path / "bad.jsonl").write_text('{"text": "unfinished')
    with pytest.raises(ValueError, match="bad.jsonl' could not be read"):
        read_corpus(tmp_path / "bad.jsonl", 1)
    for name, content in (("latin.txt", "caf\xe9".encode("latin-1") * 50), ("bytes.jsonl", bytes(range(128, 256)))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}' could not be read .*it must be UTF-8"):
            read_corpus(tmp_path / name, 1)
    (tmp_path / "pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="pointer.txt' is a pointer of Git LFS"):
        read_corpus(tmp_path / "pointer.txt", 1)
    (tmp_path / "rows.jsonl").write_bytes('{"text": "caf\xe9"}\n'.encode("latin-1") * 50)
    with pytest.raises(ValueError, match="rows.jsonl' is no UTF-8: save it as UTF-8"):
        read_corpus(tmp_path / "rows.jsonl", 5)
    (tmp_path / "wide.txt").write_text(TEXTS[0], encoding="utf-16")
    with pytest.raises(ValueError, match="wide.txt' is no UTF-8, .*: save it as UTF-8"):
        read_corpus(tmp_path / "wide.txt", 1)
    with pytest.raises(ValueError, match="`split` is for datasets on the Hub"):
        read_corpus(Corpus(tmp_path / "wide.txt", split="test"), 1)
    for name, content in (("empty.jsonl", ""), ("blank.txt", "\n\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}' is empty"):
            read_corpus(tmp_path / name, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no dataset"):
        read_corpus(tmp_path / "empty", 1)
    (tmp_path / "text.doc").write_text("x")
    with pytest.raises(ValueError, match="unknown type"):
        read_corpus(tmp_path / "text.doc", 1)


def test_a_column_of_anything_but_text_is_one_clear_error_and_missing_texts_are_left_out():
    assert read_corpus(datasets.Dataset.from_dict({"text": [None, *TEXTS]}), 10) == TEXTS
    with pytest.raises(ValueError, match="column 'text' .* must hold strings, got int"):
        read_corpus(datasets.Dataset.from_dict({"text": [1, 2]}), 10)


@pytest.mark.parametrize(
    "around", [lambda text: text, Corpus, lambda text: SelfWritten(corpus=text), lambda text: Mixture((text, 1))]
)
def test_a_file_that_is_not_there_is_told_before_anything_is_loaded(around, tmp_path):
    check_text(around(TEXTS))
    for name in (str(tmp_path / "no.jsonl"), "./no/such/corpus"):
        with pytest.raises(OSError, match="does not exist"):
            check_text(around(name))


def test_a_text_that_cannot_be_used_is_told_by_its_argument():
    for value in (5, "self", "c4"):
        with pytest.raises(ValueError, match="`fit_text`"):
            check_texts([TEXTS], value)
        with pytest.raises(ValueError, match="`corpus`"):
            check_texts([SelfWritten(corpus=value)])
    for value in (Survey(), Mixture((Survey(), 1))):
        with pytest.raises(ValueError, match="`fit_text` is general text"):
            check_texts([TEXTS], value)


def test_mixture_keeps_shares_in_every_stretch():
    other = [f"Other text {i}, which is also long enough to be read by the reader." for i in range(10)]
    mixed = read_text(Mixture((TEXTS, 1), (other, 2)), 9, write=None)
    kinds = [sample.text.startswith("Other") for sample in mixed]
    assert len(mixed) == 9 and sum(kinds) == 6
    assert all(sum(kinds[i : i + 3]) in (1, 2, 3) for i in range(0, 9, 3))
    with pytest.raises(ValueError, match="positive weight"):
        Mixture((TEXTS, 0))
    for part in (TEXTS, "ab", (TEXTS, "x")):
        with pytest.raises(ValueError, match="positive weight"):
            Mixture(part)


@pytest.fixture(scope="module")
def writer(byte_tokenizer):
    return tiny_model(vocab_size=len(byte_tokenizer))


def write(writer, byte_tokenizer, piece_tokenizer, limit=5, **options):
    spec = SelfWritten(max_new_tokens=8, batch_size=2, **options)
    return write_texts(writer, byte_tokenizer, piece_tokenizer, spec, limit, seed=0)


def test_self_written_text_starts_with_its_prefix(writer, byte_tokenizer, piece_tokenizer):
    state = torch.get_rng_state()
    samples = write(writer, byte_tokenizer, piece_tokenizer, prefix=("Question:", "Problem:"))
    assert torch.equal(torch.get_rng_state(), state)
    assert [s.source_prompt for s in samples] == ["Question:", "Problem:"] * 2 + ["Question:"]
    assert all(s.text and s.source_prompt == s.target_prompt and not s.rendered for s in samples)
    assert len({s.text for s in samples}) == 5
    assert samples == write(writer, byte_tokenizer, piece_tokenizer, prefix=("Question:", "Problem:"))
    assert byte_tokenizer.padding_side == "right"


def test_template_around_corpus_snippets(writer, byte_tokenizer, piece_tokenizer):
    samples = write(
        writer, byte_tokenizer, piece_tokenizer, template="Say: {text}\n=>", corpus=TEXTS, snippet_chars=13, samples=3
    )
    assert [s.target_prompt for s in samples] == [f"Say: Text number {i}\n=>" for i in range(3)]


TEMPLATE = "{{ bos_token }}{% for m in messages %}[%s] {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("target_has_template", [False, True])
def test_chat_template_when_the_tokenizer_has_one(writer, byte_tokenizer, piece_tokenizer, target_has_template):
    byte_tokenizer.chat_template = TEMPLATE.replace("%s", "source")
    piece_tokenizer.chat_template = TEMPLATE.replace("%s", "target") if target_has_template else None
    try:
        samples = write(writer, byte_tokenizer, piece_tokenizer, corpus=TEXTS)
    finally:
        byte_tokenizer.chat_template = piece_tokenizer.chat_template = None
    assert samples[0].source_prompt == f"<s>[source] {TEXTS[0]}\n"
    # Without a template of its own the target reads the source's, after the token that its tokenizer puts first.
    expected = f"<bos>{f'[target] {TEXTS[0]}' if target_has_template else samples[0].source_prompt.rstrip()}\n"
    assert samples[0].target_prompt == expected
    assert TEXTS[0] not in samples[0].text and samples[0].rendered


@pytest.mark.parametrize("template", ["{{ raise_exception('no users') }}", "{% for m in %}", "{{ messages.a.b }}"])
def test_a_chat_template_that_fails_is_one_clear_error(template, writer, byte_tokenizer, piece_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat template of the source tokenizer fails .*`prompts`"):
        write(writer, tokenizer, piece_tokenizer, corpus=TEXTS)


def test_without_a_chat_template_snippets_are_continued(writer, byte_tokenizer, piece_tokenizer):
    samples = write(writer, byte_tokenizer, piece_tokenizer, corpus=TEXTS)
    assert samples == [TextSample(s.text, t, t) for s, t in zip(samples, TEXTS)]
    with pytest.raises(ValueError, match="no chat template"):
        write(writer, byte_tokenizer, piece_tokenizer, corpus=TEXTS, chat=True)


PROMPTS = [f"Question: how many are {a} and {b}?\nAnswer:" for a, b in ((1, 2), (30, 4), (5, 61), (7, 8))]


def test_what_prompts_share_is_found():
    assert common_affixes(PROMPTS) == ("Question: how many are ", "\nAnswer:")
    assert common_affixes(["Say: one thing", "Say: other thing"]) == ("Say: ", " thing")
    assert common_affixes(["abc", "abd"]) == ("", "") and common_affixes(["alone"]) == ("", "")
    assert common_affixes(["a b", "a b"]) == ("a ", "")


class Continues:
    """Stands for the sampling of a model: continues every list of prompts with the next of some texts."""

    def __init__(self, texts):
        self.texts, self.asked = iter(texts), []

    def __call__(self, model, tokenizer, texts, *options):
        self.asked += texts
        return [next(self.texts) for _ in texts]


def test_further_prompts_follow_the_given_ones(monkeypatch, writer, byte_tokenizer):
    answers = [
        " 9 and 9?\n\nQuestion:",
        " 30 and 4?\n",
        " 1 and 1",
        "\n",
        " 9 and 9?\n",
        " 2 and 90?\nmore",
        " " + "9" * 60 + "\n",
    ]
    answers += [f" 3 and {i}?\n" for i in range(20)]
    monkeypatch.setattr(written, "_sample", fake := Continues(answers))
    found = written.write_prompts(writer, byte_tokenizer, PROMPTS, 3, batch_size=4)
    # not: one of the given, an unfinished one, an empty one, a repeated one, one far too long
    assert found == [f"Question: how many are {x}?\nAnswer:" for x in ("9 and 9", "2 and 90", "3 and 0")]
    assert all(text.count("Question: how many are") == 5 and text.endswith("how many are") for text in fake.asked)


def test_a_model_without_a_first_token_cannot_write_from_nothing(writer, byte_tokenizer, piece_tokenizer):
    with pytest.raises(ValueError, match="no token to begin a text with"):
        write_texts(writer, byte_tokenizer, piece_tokenizer, SelfWritten(prefix=""), 2)


def test_a_model_that_writes_no_prompts_ends_in_a_few_rounds(monkeypatch, writer, byte_tokenizer):
    monkeypatch.setattr(written, "_sample", fake := Continues([""] * 1000))
    assert written.write_prompts(writer, byte_tokenizer, PROMPTS, 10, batch_size=4) == []
    assert len(fake.asked) <= 40


def test_prompts_are_answered_the_given_ones_first(writer, byte_tokenizer, piece_tokenizer, monkeypatch):
    more = ["Question: how many are 2 and 2?\nAnswer:"]
    monkeypatch.setattr(written, "write_prompts", lambda model, tokenizer, prompts, count, *rest: more[:count])
    spec = SelfWritten(prompts=PROMPTS, max_new_tokens=8)
    samples = write_texts(writer, byte_tokenizer, piece_tokenizer, spec, 7, target=writer)
    assert [s.source_prompt for s in samples] == [*PROMPTS, *more, *PROMPTS[:2]]
    alone = write_texts(writer, byte_tokenizer, piece_tokenizer, replace(spec, more_prompts=0), 5, target=writer)
    assert [s.source_prompt for s in alone] == [*PROMPTS, PROMPTS[0]]


@pytest.mark.parametrize(
    ("temperature", "top_p", "k"), [(1.0, 1.0, 50), (0.5, 1.0, 50), (1.0, 0.6, 50), (1.0, 1.0, 3)]
)
def test_sampling_among_the_likeliest_has_the_right_distribution(temperature, top_p, k):
    scores = torch.tensor([2.0, 0.0, 1.5, -1.0, 1.0])
    draw = written.SampleTopK(temperature, top_p, k)
    drawn = draw(None, scores.expand(20_000, 5)).argmax(-1)
    expected = (scores / temperature).softmax(-1)
    order = expected.sort(descending=True)
    kept = order.indices[: min(k, int((order.values.cumsum(0) < top_p).sum()) + 1)]
    expected = torch.zeros(5).scatter(0, kept, expected[kept])
    found = torch.bincount(drawn, minlength=5) / 20_000
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.015)


def test_a_batch_of_written_text_depends_on_nothing_but_its_prompts_and_the_seed(
    writer, byte_tokenizer, piece_tokenizer
):
    spec = SelfWritten(prefix="Say", max_new_tokens=8, batch_size=2)

    def texts(kept: dict[str, list[str]], seed: int = 0) -> list[TextSample]:
        return write_texts(writer, byte_tokenizer, piece_tokenizer, spec, 6, seed, keep=keep_in(kept))

    whole: dict[str, list[str]] = {}
    samples = texts(whole)
    assert len(whole) == 3
    for absent in whole:
        torch.manual_seed(99)
        assert texts({key: batch for key, batch in whole.items() if key != absent}) == samples
    assert texts(dict(whole), seed=1) != samples


def test_impossible_self_written_settings():
    with pytest.raises(ValueError, match="only one of"):
        SelfWritten(prefix="a", template="{text}")
    with pytest.raises(ValueError, match="only one of"):
        SelfWritten(prompts=["a"], prefix="a")
    with pytest.raises(ValueError, match="list of at least one"):
        SelfWritten(prompts="a prompt")
    for prompts in ([1, 2], [""]):
        with pytest.raises(ValueError, match="`prompts` must hold texts that are not empty, got"):
            SelfWritten(prompts=prompts)
    for name, value in (("samples", 0), ("max_new_tokens", 0), ("temperature", -1), ("top_p", 0), ("batch_size", 1.5)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            SelfWritten(prefix="a", **{name: value})
    with pytest.raises(ValueError, match="`more_prompts` needs `prompts`"):
        SelfWritten(prefix="a", more_prompts=3)
    with pytest.raises(ValueError, match="must contain '{text}'"):
        SelfWritten(template="no place")


def test_jsonl_of_the_repository_is_read():
    from conftest import ROOT

    texts = read_corpus(ROOT / "examples" / "data" / "c4_en_400.jsonl", 400)
    first = json.loads((ROOT / "examples" / "data" / "c4_en_400.jsonl").open().readline())["text"]
    assert texts[0] == first and len(texts) > 350


def test_general_text_may_be_a_path_or_a_mixture_and_no_survey(tmp_path):
    file = tmp_path / "general.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4]))
    check_texts([TEXTS], file)  # a path has parts of its own
    check_texts([TEXTS], Mixture((file, 1), (TEXTS, 2)))
    for survey in (Survey(), Mixture((file, 1), (Survey(), 1))):
        with pytest.raises(ValueError, match="a `Survey` asks what the adapter does"):
            check_texts([TEXTS], survey)
