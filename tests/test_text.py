"""What is read as text."""

import json

import datasets
import pytest
import torch
from conftest import tiny_model

from peft_cast.text import Corpus, Mixture, SelfWritten, TextSample, read_corpus, read_text, write_texts


TEXTS = [f"Text number {i}, which is long enough to be read by the corpus reader." for i in range(6)]


@pytest.fixture
def files(tmp_path):
    data = datasets.Dataset.from_dict({"text": TEXTS, "other": list(range(6))})
    data.to_json(tmp_path / "texts.jsonl")
    data.to_parquet(tmp_path / "texts.parquet")
    data.to_csv(tmp_path / "texts.csv")
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    return tmp_path


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.parquet", "texts.csv", "texts.txt", "saved"])
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
    with pytest.raises(ValueError, match=r"no column 'text'.*\['body'\].*column="):
        read_corpus(rows, 1)


@pytest.mark.parametrize("corpus", [None, "allenai/c4", "user/some-dataset", Corpus("user/other", name="en")])
def test_offline_hub_dataset_is_one_clear_error(corpus):
    with pytest.raises(OSError, match=r"could not be reached.*text='my_texts.jsonl'"):
        read_corpus(corpus, 1)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], "holds no text of at least 50 characters"),
        (["too short"], "holds no text of at least 50 characters"),
        ([1, 2], "must hold strings, got int"),
        (7, "must be a hub id, a path, an iterable"),
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
    (tmp_path / "text.doc").write_text("x")
    with pytest.raises(ValueError, match="unknown type"):
        read_corpus(tmp_path / "text.doc", 1)


def test_mixture_keeps_shares_in_every_stretch():
    other = [f"Other text {i}, which is also long enough to be read by the reader." for i in range(10)]
    mixed = read_text(Mixture((TEXTS, 1), (other, 2)), 9, write=None)
    kinds = [sample.text.startswith("Other") for sample in mixed]
    assert len(mixed) == 9 and sum(kinds) == 6
    assert all(sum(kinds[i : i + 3]) in (1, 2, 3) for i in range(0, 9, 3))
    with pytest.raises(ValueError, match="positive weight"):
        Mixture((TEXTS, 0))


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
    assert [s.text.split(":")[0] for s in samples] == ["Question", "Problem"] * 2 + ["Question"]
    assert all(len(s.text) > 12 and not s.source_prompt for s in samples)
    assert len({s.text for s in samples}) == 5
    assert samples == write(writer, byte_tokenizer, piece_tokenizer, prefix=("Question:", "Problem:"))
    assert byte_tokenizer.padding_side == "right"


def test_template_around_corpus_snippets(writer, byte_tokenizer, piece_tokenizer):
    samples = write(
        writer, byte_tokenizer, piece_tokenizer, template="Say: {text}\n=>", corpus=TEXTS, snippet_chars=13, samples=3
    )
    assert [s.text.split("\n")[0] for s in samples] == [f"Say: Text number {i}" for i in range(3)]


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
    expected = f"<bos>[target] {TEXTS[0]}\n" if target_has_template else samples[0].source_prompt
    assert samples[0].target_prompt == expected
    assert TEXTS[0] not in samples[0].text


def test_without_a_chat_template_snippets_are_continued(writer, byte_tokenizer, piece_tokenizer):
    samples = write(writer, byte_tokenizer, piece_tokenizer, corpus=TEXTS)
    assert all(s.text.startswith("Text number") and s == TextSample(s.text) for s in samples)
    with pytest.raises(ValueError, match="no chat template"):
        write(writer, byte_tokenizer, piece_tokenizer, corpus=TEXTS, chat=True)


def test_impossible_self_written_settings():
    with pytest.raises(ValueError, match="not both"):
        SelfWritten(prefix="a", template="{text}")
    with pytest.raises(ValueError, match="must contain '{text}'"):
        SelfWritten(template="no place")


def test_jsonl_of_the_repository_is_read():
    from conftest import ROOT

    texts = read_corpus(ROOT / "examples" / "data" / "c4_en_400.jsonl", 400)
    first = json.loads((ROOT / "examples" / "data" / "c4_en_400.jsonl").open().readline())["text"]
    assert texts[0] == first and len(texts) > 350
