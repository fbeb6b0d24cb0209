"""Publishing: what is uploaded, what the card says, which licenses it names, and how failures end; the real client."""

import json
import re
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from adapters import INPUTS, base_model, cast, lora_config, same
from conftest import c4_texts
from huggingface_hub import HfApi, ModelCard, constants, metadata_load
from peft import PeftModel, get_peft_model

import peft_cast
from peft_cast import Bridge, Evaluation, TranslationResult, to_lora
from peft_cast.options import Options
from peft_cast.results.artifacts import read_artifact
from peft_cast.results.licenses import License, Licenses, read_licenses
from peft_cast.results.rows import Measurement


NAMES = {
    "source_model_name_or_path": "org/source",
    "source_adapter_name_or_path": "org/lora",
    "source_adapter_revision": "v1",
    "base_model_name_or_path": "org/target",
}
METRICS = {
    "kl": {"target": 1.0, "closed_form": 0.9, "translated": 0.25},
    "excitement": 0.3,
    "source": {"not_carried": [{"what": "trained bias", "module": "a.b"}]},
}
CAST_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "cast_metrics.json"}
pytestmark = pytest.mark.filterwarnings("ignore:No license is inherited")


def logits(model):
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def made(seed: int = 3, adapter_name: str = "default", **names) -> TranslationResult:
    """A result as `translate` returns it, of a random adapter."""
    model = cast(seed=seed, adapter_name=adapter_name)
    for name, value in {**NAMES, **names}.items():
        setattr(model.peft_config[adapter_name], name, value)
    return TranslationResult(model, METRICS, [], None, adapter_name)


@pytest.fixture
def folder(tmp_path):
    made().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(scope="module")
def bridge(source_folder, target_folder):
    return peft_cast.fit_bridge(
        source_folder, target_folder, text=c4_texts(8), samples=8, max_length=32, progress=False
    )


def write_license(folder, metadata: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")
    return str(folder)


def contents(folder) -> dict:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "README.md"}


# Round trips


def test_pushed_adapters_load_by_their_id_and_older_ones_by_their_revision(hub):
    first = made()
    commit = first.push_to_hub("user/cast")
    second = made(seed=8)
    later = second.push_to_hub("user/cast", commit_message="better")
    assert set(HfApi().list_repo_files("user/cast")) == CAST_FILES
    assert "POST /api/validate-yaml" in hub.requests  # the client has the Hub look at the card
    assert commit.oid != later.oid and hub.repos["user/cast"].messages[later.oid] == "better"
    same(logits(PeftModel.from_pretrained(base_model(), "user/cast")), logits(second.model))
    same(logits(PeftModel.from_pretrained(base_model(), "user/cast", revision=commit.oid)), logits(first.model))


def test_branches_and_pull_requests_leave_main_alone(hub, folder):
    main = peft_cast.push(folder, "user/cast")
    branch = made(seed=8)
    branch.push_to_hub("user/cast", revision="experiment")
    request = made(seed=9).push_to_hub("user/cast", create_pr=True)
    refs = hub.repos["user/cast"].refs
    assert refs["main"] == main.oid and refs["refs/pr/1"] == request.oid and request.pr_num == 1
    same(logits(PeftModel.from_pretrained(base_model(), "user/cast", revision="experiment")), logits(branch.model))


def test_pull_requests_reach_repositories_of_others(hub, folder):
    peft_cast.push(folder, "other/cast", token="hf_other")
    peft_cast.push(folder, "other/cast", create_pr=True)
    assert "refs/pr/1" in hub.repos["other/cast"].refs


def test_adapters_of_another_name_are_published_at_the_root(hub):
    result = made(adapter_name="math")
    result.push_to_hub("user/cast")
    assert set(hub.repos["user/cast"].files()) == CAST_FILES
    same(logits(PeftModel.from_pretrained(base_model(), "user/cast")), logits(result.model))


def test_folded_loras_make_the_round_trip_and_remember_their_origin(hub, folder, tmp_path):
    model = made().model
    to_lora(model, rank=8).push_to_hub("user/folded")
    loaded = PeftModel.from_pretrained(base_model(), "user/folded")
    assert loaded.active_peft_config.peft_type == "LORA"
    same(logits(loaded), logits(model))
    card = HfApi().model_info("user/folded").card_data
    assert (
        card["source_adapter"] == "org/lora"
        and "import peft_cast" in hub.repos["user/folded"].files()["README.md"].decode()
    )


def test_folding_keeps_the_metrics_of_what_was_published_and_says_what_was_cut(hub, folder, tmp_path, monkeypatch):
    peft_cast.push(folder, "user/cast")
    config = json.loads((folder / "adapter_config.json").read_text())
    base_model().save_pretrained(tmp_path / "target")
    hub.repos["user/cast"].files()["adapter_config.json"] = json.dumps(
        {**config, "base_model_name_or_path": str(tmp_path / "target")}
    ).encode()
    exact, cut = to_lora("user/cast"), to_lora("user/cast", rank=2)
    exact.save_pretrained(tmp_path / "exact")
    cut.save_pretrained(tmp_path / "cut")
    cards = [ModelCard.load(tmp_path / name / "README.md") for name in ("exact", "cut")]
    assert "0.2500" in cards[0].text and cards[0].data.eval_results[0].metric_value == 0.25
    assert "before the rank was\ncut" in cards[1].text and cards[1].data.eval_results is None
    assert f"{max(cut.errors.values()):.3f}" in cards[1].text


def test_bridges_make_the_round_trip(hub, bridge):
    with pytest.warns(UserWarning, match="others will not find it"):
        commit = bridge.push_to_hub("user/bridge", private=True)
    again = Bridge.from_pretrained("user/bridge", revision=commit.oid)
    assert again.modules == bridge.modules and again.metrics == bridge.metrics
    files = hub.repos["user/bridge"].files()
    assert set(files) == {"README.md", "bridge_config.json", "bridge_model.safetensors"}
    assert 'Bridge.from_pretrained("user/bridge")' in files["README.md"].decode()
    assert f"explain {bridge.metrics['r2_in']:.2f} of the variance" in files["README.md"].decode()
    assert hub.repos["user/bridge"].private


def test_bridges_are_also_published_by_the_mixins_own_argument(hub, bridge, tmp_path):
    bridge.save_pretrained(tmp_path, push_to_hub=True, repo_id="user/bridge", branch="next")
    assert "bridge_model.safetensors" in hub.repos["user/bridge"].files("next")
    assert "bridge_model.safetensors" not in hub.repos["user/bridge"].files("main")


# What is uploaded


def test_only_what_belongs_to_the_adapter_leaves_the_folder(hub, folder):
    (folder / "checkpoint-5").mkdir()
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        ".env",
        "token",
        "credentials.json",
        "adapter_model.bin",
        "checkpoint-5/adapter_model.safetensors",
        "checkpoint-5/README.md",
        "checkpoint-5/plot.png",
    ):
        (folder / name).write_text("secret")
    for name in ("lift.png", "tokenizer.json", "LICENSE"):
        (folder / name).write_text("public")
    peft_cast.push(folder, "user/cast")
    assert set(hub.repos["user/cast"].files()) == CAST_FILES | {"lift.png", "tokenizer.json", "LICENSE"}


def make_lora_folder(folder):
    model = get_peft_model(base_model(), lora_config())
    model.save_pretrained(folder)
    return TranslationResult(model, METRICS, [], None)


def break_folder(folder, how: str):
    if how == "distilled":
        make_lora_folder(folder).save_pretrained(folder)
    elif how == "lora":
        shutil.rmtree(folder)
        make_lora_folder(folder)
    elif how == "weights":
        (folder / "adapter_model.safetensors").unlink()
    elif how == "config":
        (folder / "adapter_config.json").write_text("{")
    elif how == "metrics":
        (folder / "cast_metrics.json").write_text("[]")
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("distilled", "type LORA that peft-cast did not translate"),
        ("lora", "type LORA that peft-cast did not translate"),
        ("weights", "has no adapter_model.safetensors"),
        ("config", "is broken"),
        ("metrics", "is broken"),
        ("absent", "neither a CAST adapter, nor a folded LoRA, nor a bridge"),
    ],
)
def test_folders_that_hold_nothing_of_ours_are_refused_before_anything_is_sent(hub, folder, how, message):
    break_folder(folder, how)
    hub.requests.clear()
    with pytest.raises(ValueError, match=message):
        peft_cast.push(folder, "user/cast")
    assert not hub.requests


# Failures


@pytest.mark.parametrize(
    ("repo_id", "options", "kind", "message"),
    [
        ("user/cast", {"token": "hf_wrong"}, OSError, r"does not accept the token \(401\).*settings/tokens"),
        ("user/cast", {"token": "hf_reader"}, OSError, r"may not write there \(403\).*don't have the rights"),
        ("other/cast", {}, OSError, r"may not write there \(403\)"),
        ("user/cast", {"token": "hf_\nsecret"}, OSError, "the connection failed"),
        ("user/cast", {"token": False}, OSError, "hf auth login"),
        ("a b", {}, ValueError, "cannot be the name of a repository"),
        ("user/cast/math", {}, ValueError, "cannot be the name of a repository"),
        ("user/cast", {"create_pr": True, "revision": "v2"}, ValueError, "not both"),
    ],
)
def test_refusals_end_in_one_sentence_that_says_what_to_do(hub, folder, repo_id, options, kind, message):
    before = contents(folder)
    with pytest.raises(kind, match=message) as raised:
        peft_cast.push(folder, repo_id, **options)
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)
    assert contents(folder) == before and repo_id not in hub.repos


def test_metadata_that_the_hub_refuses_is_named(hub, folder):
    write_license(folder, "base_model: /a/folder/here")
    with pytest.raises(OSError, match=r"refused \(400\).*/a/folder/here.*not valid.*check .* README.md"):
        peft_cast.push(folder, "user/cast")


def test_without_a_token_or_offline_nothing_is_saved_or_sent(hub, monkeypatch):
    result = made()
    monkeypatch.setattr(TranslationResult, "_save", lambda *_: pytest.fail("it was saved"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="there is none: log in"):
        result.push_to_hub("user/cast")
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
        result.push_to_hub("user/cast")
    assert not hub.requests


def test_private_is_not_uploaded_to_a_public_repository(hub, folder):
    oid = peft_cast.push(folder, "user/cast").oid
    with pytest.raises(ValueError, match="exists and is public"):
        peft_cast.push(folder, "user/cast", private=True)
    assert hub.repos["user/cast"].refs["main"] == oid


def test_private_repositories_are_not_read_without_the_token(hub, folder, monkeypatch):
    peft_cast.push(folder, "user/cast", private=True)
    assert hub.repos["user/cast"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="adapter 'user/cast' could not be read"):
        to_lora("user/cast")


@pytest.mark.parametrize("moment", ["/repos/create", "/lfs/", "/commit/"])
def test_a_hub_that_dies_midway_costs_nothing(hub, folder, moment, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # the client's retries
    before = contents(folder)
    hub.dies_at = moment
    with pytest.raises(OSError, match=r"connection failed \(\w+\); check the network and call again") as raised:
        peft_cast.push(folder, "user/cast")
    assert "\n" not in str(raised.value) and contents(folder) == before
    hub.dies_at, hub.dead = None, False
    peft_cast.push(folder, "user/cast")
    assert set(hub.repos["user/cast"].files()) == CAST_FILES


# Cards


def test_cards_name_target_source_and_adapter_in_metadata_and_text(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == ["org/target"] and card.data["base_model_relation"] == "adapter"
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    wanted = {"cast", "lora-translation", "base_model:adapter:org/target", "source_model:org/source", "transformers"}
    assert wanted | {"source_adapter:org/lora"} == set(card.data.tags)
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores == {"kl_divergence": 0.25, "way_covered": 0.75}
    assert "import peft_cast" in card.text and '.from_pretrained("org/target")' in card.text
    assert "https://huggingface.co/org/lora) at `v1`" in card.text and "trained bias (a.b)" in card.text
    assert str(card).count("\n---\n") == 1 and card.text.count("- PEFT ") == 1


def test_the_example_loads_the_revision_of_the_target(tmp_path):
    made(revision="v2").save_pretrained(tmp_path)
    assert '.from_pretrained("org/target", revision="v2")' in (tmp_path / "README.md").read_text()


def test_options_that_differ_from_their_defaults_are_on_the_card_and_no_others(tmp_path):
    own = str(tmp_path / "secret-place" / "my.jsonl")
    settings = Options.of({"steps": 7, "module_map": {"fc1": "up|proj"}, "fit_text": own, "seed": 0}).settings()
    for name, of_run, shown in (
        ("new", {**settings, "projection_type": "compact", "rank": 8}, "`steps` `module_map` `fit_text`"),
        (
            "earlier",
            {"steps": 100, "loss": {"gamma": 0.5, "top_k": 128}, "projection_type": "mlp"},
            "`gamma` `projection_type`",
        ),
        ("default", {**Options().settings(), "projection_type": "compact", "rank": 8}, ""),
    ):
        replace(made(), metrics={**METRICS, "settings": of_run}).save_pretrained(tmp_path / name)
        text = (tmp_path / name / "README.md").read_text()
        table = text.split("## How it was made")[1].split("##")[0] if shown else ""
        assert ("## How it was made" in text) == bool(shown) and set(re.findall("`.+?`", table)) == set(shown.split())
        if name == "new":
            assert "| `steps` | 7 |" in table and r"fc1: up\|proj" in table
            assert "| my.jsonl |" in table and "secret-place" not in text


def test_saving_again_writes_the_card_again_and_once(folder):
    made(source_adapter_name_or_path="org/better").save_pretrained(folder)
    newer = made(source_model_name_or_path="org/newer")
    newer.save_pretrained(folder)
    with pytest.raises(ValueError, match="holds an adapter of type CAST, which would be overwritten"):
        to_lora(newer.model).save_pretrained(folder)
    text = (folder / "README.md").read_text()
    assert "org/newer" in text and not {"org/source", "org/better"} & set(re.findall(r"org/\w+", text))
    assert text.count("\n---\n") == 1 and text.count("## Use") == 1


def test_folders_of_this_machine_are_neither_base_models_nor_spelled_out(tmp_path):
    target = tmp_path / "secret-place" / "my-target"
    target.mkdir(parents=True)
    made(base_model_name_or_path=str(target)).save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "my-target" in text and "secret-place" not in text
    assert "base_model" not in metadata_load(tmp_path / "saved" / "README.md")


def test_a_card_that_somebody_changed_is_kept(hub, folder):
    file = folder / "README.md"
    text = re.sub(r"<!-- Written by peft-cast.*\n", "My own words.\n", file.read_text())
    file.write_text(text)
    peft_cast.push(folder, "user/cast")
    assert file.read_text() == text and "My own words." in hub.repos["user/cast"].files()["README.md"].decode()
    made().save_pretrained(folder)  # PEFT renews the metadata of such a card, as it does with every card
    assert "My own words." in file.read_text()


@pytest.mark.parametrize("filled_in", [False, True])
def test_pefts_empty_form_is_replaced_unless_it_was_filled_in(hub, tmp_path, filled_in):
    model = made().model
    model.get_base_model().model_tags = ["unsloth"]
    model.save_pretrained(tmp_path)
    file = tmp_path / "README.md"
    if filled_in:
        file.write_text(file.read_text().replace("[More Information Needed]", "Me", 1))
    file.write_text(file.read_text().replace("---\n", "---\nlanguage: en\n", 1))
    HfApi().create_repo("user/cast")
    peft_cast.push(tmp_path, "user/cast")
    text, metadata = file.read_text(), metadata_load(file)
    assert ("translated with peft-cast" in text) is not filled_in
    assert metadata["language"] == "en" and "unsloth" in metadata["tags"]
    assert ("lora-translation" in metadata["tags"]) is not filled_in


def measured(*adapters: str) -> Evaluation:
    scores = {"base": 0.6, "retrained": 0.4, "translated": 0.45, "direct copy": 0.59}
    rows = [
        Measurement(name, 0, "held-out GSM8K", "nats_per_character", False, {"nats_per_character": scores[name]})
        for name in ("base", *adapters, "retrained")
    ]
    return Evaluation(tuple(rows), {"held-out GSM8K": "retrained"}, {})


def test_an_evaluation_is_in_the_table_and_the_index_and_stays_until_the_adapter_changes(hub, folder):
    peft_cast.push(folder, "user/cast", evaluation=measured("translated"))
    card = HfApi().model_info("user/cast").card_data
    scores = {(r.dataset_name, r.metric_type): r.metric_value for r in card.eval_results}
    assert scores["held-out GSM8K", "recovered_lift"] == 0.75
    assert scores["held-out GSM8K", "nats_per_character"] == 0.45
    assert "| translated | 0.450 (0.75) |" in hub.repos["user/cast"].files()["README.md"].decode()
    peft_cast.push(folder, "user/cast")
    assert "0.450 (0.75)" in hub.repos["user/cast"].files()["README.md"].decode()
    made(seed=8).save_pretrained(folder)
    assert "0.450 (0.75)" not in (folder / "README.md").read_text()


def test_which_adapter_was_evaluated_must_be_clear(folder):
    evaluation = measured("translated", "direct copy")
    with pytest.raises(ValueError, match="Several adapters were evaluated: name one of base, translated, direct copy"):
        made().save_pretrained(folder, evaluation=evaluation)
    with pytest.raises(ValueError, match="'absent' was not evaluated"):
        made().save_pretrained(folder, evaluation=evaluation, evaluated_as="absent")
    made().save_pretrained(folder, evaluation=evaluation, evaluated_as="direct copy")
    lifts = [r.metric_value for r in ModelCard.load(folder / "README.md").data.eval_results if "lift" in r.metric_type]
    assert lifts == [0.05]


# Licenses


def licenses(*of: str) -> Licenses:
    named = {"other:Own": License("other", "Own"), "unknown": License()}
    return Licenses(dict(zip(("source", "adapter", "target"), (named.get(i, License(i)) for i in of))))


@pytest.mark.parametrize(
    ("of", "inherited"),
    [
        (("apache-2.0", "apache-2.0", "apache-2.0"), "apache-2.0"),
        (("gemma", "gemma", "gemma"), "gemma"),
        (("other:Own", "other:Own", "other:Own"), "Own"),
        (("mit", "mit"), "mit"),
    ],
)
def test_one_license_of_all_is_inherited(of, inherited):
    assert str(licenses(*of).inherited) == inherited and licenses(*of).warning is None


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (("apache-2.0", "apache-2.0", "mit"), ["they differ", "target model: mit"]),
        (("apache-2.0", "apache-2.0", "gemma"), ["they differ", "gemma has terms of its own"]),
        (
            ("llama3.2", "cc-by-nc-4.0", "mit"),
            ["cc-by-nc-4.0 is for non-commercial use", "llama3.2 has terms of its own"],
        ),
        (("mit", "unknown", "mit"), ["that of the source adapter is unknown", "target model: mit"]),
        (("other", "other", "other"), ["none is known"]),
        (("unknown", "unknown"), ["none is known"]),
    ],
)
def test_licenses_that_differ_or_are_unknown_are_told_in_one_sentence(of, said):
    warning = licenses(*of).warning
    assert not licenses(*of).inherited.known and "\n" not in warning and warning.count(". ") == 0
    for part in [*said, "state yours as `license:`"]:
        assert part in warning


def test_licenses_are_read_from_folders(tmp_path):
    names = {
        "source_model_name_or_path": write_license(tmp_path / "source", "license: gemma"),
        "source_adapter_name_or_path": write_license(tmp_path / "adapter", "license: [mit"),  # broken YAML
        "base_model_name_or_path": write_license(tmp_path / "target", "license: other\nlicense_name: own-terms"),
    }
    made(**names).save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert [line.rsplit("| ", 1)[1] for line in text.splitlines() if line.startswith(("| source", "| target m"))] == [
        "gemma |",
        "unknown |",
        "own-terms |",
    ]
    assert "that of the source adapter is unknown" in text and "license" not in metadata_load(
        tmp_path / "saved" / "README.md"
    )


def test_licenses_are_read_from_the_hub_and_inherited(hub, folder, tmp_path, monkeypatch):
    for name in ("source", "lora", "target"):
        write_license(tmp_path / name, "license: apache-2.0")
        refs = hub.add(f"org/{name}", tmp_path / name).refs
        refs["v1"] = refs["main"]
    with warnings.catch_warnings(record=True) as caught:
        peft_cast.push(folder, "user/cast")
    assert not [w for w in caught if "license" in str(w.message)]
    assert HfApi().model_info("user/cast").card_data.license == "apache-2.0"
    write_license(tmp_path / "target", "license: gemma")
    hub.add("org/target", tmp_path / "target")
    with pytest.warns(UserWarning, match="No license is inherited .* they differ"):
        peft_cast.push(folder, "user/cast")
    assert HfApi().model_info("user/cast").card_data.license is None

    HfApi().hf_hub_download("org/target", "README.md")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = read_licenses(read_artifact(folder)).by_role
    assert (
        found["target"] == License("gemma") and not found["source"].known
    )  # the one in the cache, and one that is not


def test_a_license_that_the_publisher_states_stays_and_ends_the_warning(hub, folder):
    with pytest.warns(UserWarning, match="No license is inherited .* none is known"):
        peft_cast.push(folder, "user/cast")
    file = folder / "README.md"
    file.write_text(file.read_text().replace("---\n", "---\nlicense: gemma\n", 1))
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            peft_cast.push(folder, "user/cast")
        assert not [w for w in caught if "license" in str(w.message)]
    assert HfApi().model_info("user/cast").card_data.license == "gemma"
    assert "License: gemma, as its publisher states." in file.read_text()


def test_adapters_that_a_bridge_carries_from_file_to_file_have_a_card(bridge, lora_folder, tmp_path):
    bridge.save_pretrained(tmp_path / "bridge")
    made().save_pretrained(tmp_path / "cast")
    bridge.cast_file(lora_folder, tmp_path / "cast")
    text = (tmp_path / "cast" / "README.md").read_text()
    assert "tiny-lora" in text and "0.2500" not in text  # the former adapter's metrics are gone
    artifact = read_artifact(tmp_path / "bridge")
    assert artifact.kind == "bridge" and "tiny-llama" in (tmp_path / "bridge" / "README.md").read_text()
