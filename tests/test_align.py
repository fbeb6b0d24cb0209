"""How two models are aligned: tokens, vocabulary, depth, modules."""

import pytest
import torch
from conftest import ALL_LINEAR, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizer

from peft_cast.align.depth import map_layers
from peft_cast.align.modules import map_modules
from peft_cast.align.similarity import linear_cka, monotone_map
from peft_cast.align.tokens import align_texts
from peft_cast.align.vocab import shared_vocabulary


def ends(tokenizer, ids, positions):
    """The text up to each position, decoded from the tokens alone."""
    return [tokenizer.decode(ids[: p + 1], skip_special_tokens=True) for p in positions]


@pytest.mark.parametrize(
    "text",
    [
        "plain words and numbers 12345",
        "naïve café, déjà vu: crème brûlée",
        "日本語のテキスト and Ελληνικά",
        "emoji 😀👩‍👩‍👧 in the middle 🎉 end",
        "  two leading spaces,\n\nblank lines\tand tabs ",
    ],
)
def test_aligned_tokens_end_at_the_same_character(text, byte_tokenizer, piece_tokenizer):
    (pair,) = align_texts([text], byte_tokenizer, piece_tokenizer, skip=0)
    source = ends(byte_tokenizer, pair.source_ids, pair.source_positions)
    target = ends(piece_tokenizer, pair.target_ids, pair.target_positions)
    assert source == target
    assert all(text.startswith(prefix) for prefix in source)
    assert source[-1] == text
    assert list(pair.source_positions) == sorted(set(pair.source_positions))
    assert list(pair.target_positions) == sorted(set(pair.target_positions))


def test_same_tokenizer_aligns_every_token(byte_tokenizer):
    (pair,) = align_texts(["Every single token has itself as its partner."], byte_tokenizer, byte_tokenizer, skip=0)
    assert pair.source_positions == pair.target_positions == tuple(range(len(pair.source_ids)))


def test_last_byte_of_an_emoji_is_matched(byte_tokenizer, piece_tokenizer):
    (pair,) = align_texts(["a😀"], byte_tokenizer, piece_tokenizer, skip=0)
    assert pair.source_positions[-1] == len(pair.source_ids) - 1
    assert pair.target_positions[-1] == len(pair.target_ids) - 1
    assert len(pair.source_positions) == 2  # "a" and the whole emoji, never a part of it


def test_bos_matches_nothing_and_shifts_positions(byte_tokenizer, piece_tokenizer):
    (pair,) = align_texts(["ab ab"], byte_tokenizer, piece_tokenizer, skip=0)
    assert pair.target_ids[0] == piece_tokenizer.bos_token_id
    assert 0 not in pair.target_positions


def test_first_positions_are_skipped_in_both_models(byte_tokenizer, piece_tokenizer):
    (pair,) = align_texts(["a long enough text for this"], byte_tokenizer, piece_tokenizer, skip=4)
    assert min(pair.source_positions) >= 4 and min(pair.target_positions) >= 4
    assert align_texts(["a"], byte_tokenizer, piece_tokenizer, skip=4) == []


def test_prompts_differ_and_are_not_aligned(byte_tokenizer, piece_tokenizer):
    (pair,) = align_texts(
        ["the answer"],
        byte_tokenizer,
        piece_tokenizer,
        source_prompts=["<s>user: hi\n"],
        target_prompts=["<bos>[a rather longer prompt] hi\n"],
        rendered=[True],
        skip=0,
    )
    assert pair.source_ids.count(byte_tokenizer.bos_token_id) == 1  # from the prompt alone
    assert pair.target_ids.count(piece_tokenizer.bos_token_id) == 1
    source = ends(byte_tokenizer, pair.source_ids, pair.source_positions)
    target = ends(piece_tokenizer, pair.target_ids, pair.target_positions)
    assert [s.removeprefix("user: hi\n") for s in source] == [
        t.removeprefix("[a rather longer prompt] hi\n") for t in target
    ]
    assert source[-1].endswith("the answer")
    assert source[0] == "user: hi\n"  # the end of the prompts predicts the first token


def test_plain_prompts_get_the_tokenizers_special_tokens(byte_tokenizer, piece_tokenizer):
    prompts = ["Question: why?\nAnswer:"]
    (pair,) = align_texts(
        [" because"], byte_tokenizer, piece_tokenizer, source_prompts=prompts, target_prompts=prompts, skip=0
    )
    assert (
        pair.target_ids.count(piece_tokenizer.bos_token_id) == 1 and pair.target_ids[0] == piece_tokenizer.bos_token_id
    )
    source = ends(byte_tokenizer, pair.source_ids, pair.source_positions)
    assert source == ends(piece_tokenizer, pair.target_ids, pair.target_positions)
    assert source[0] == prompts[0] and source[-1] == prompts[0] + " because"


def test_texts_are_cut_to_max_length(byte_tokenizer, piece_tokenizer):
    (pair,) = align_texts(["word " * 200], byte_tokenizer, piece_tokenizer, max_length=20)
    assert len(pair.source_ids) == 20 and len(pair.target_ids) == 20


def test_tokenizer_without_offsets_is_one_clear_error(byte_tokenizer):
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return 0

    with pytest.raises(ValueError, match=r"target model's tokenizer \(Slow\) gives no character offsets.*fast"):
        align_texts(["some text"], byte_tokenizer, Slow())


def test_shared_vocabulary_matches_equal_text(byte_tokenizer, piece_tokenizer):
    vocabulary = shared_vocabulary(byte_tokenizer, piece_tokenizer)
    assert len(vocabulary) > 50
    pairs = dict(zip(vocabulary.source_ids.tolist(), vocabulary.target_ids.tolist()))
    assert pairs[byte_tokenizer.eos_token_id] == piece_tokenizer.eos_token_id
    assert byte_tokenizer.bos_token_id not in pairs  # different names
    space_the = byte_tokenizer.convert_tokens_to_ids("Ġthe")
    assert piece_tokenizer.convert_ids_to_tokens(pairs[space_the]) == "▁the"
    exclamation = byte_tokenizer.convert_tokens_to_ids("!")
    assert piece_tokenizer.convert_ids_to_tokens(pairs[exclamation]) == "!"  # not the byte fallback <0x21>
    lone_byte = byte_tokenizer.convert_tokens_to_ids("ð")  # byte 0xF0, the start of an emoji
    assert piece_tokenizer.convert_ids_to_tokens(pairs[lone_byte]) == "<0xF0>"


def test_shared_vocabulary_respects_the_rows_of_the_embeddings(byte_tokenizer, piece_tokenizer):
    vocabulary = shared_vocabulary(byte_tokenizer, piece_tokenizer, source_size=100, target_size=400)
    assert vocabulary.source_ids.max() < 100 and vocabulary.target_ids.max() < 400


def test_no_common_token_is_one_clear_error(byte_tokenizer, piece_tokenizer):
    with pytest.raises(ValueError, match="no token in common"):
        shared_vocabulary(byte_tokenizer, piece_tokenizer, source_size=0)


def test_proportional_depth_map_keeps_order_and_ends():
    layers = map_layers(30, 18)
    assert list(layers) == list(range(30)) and list(layers.values()) == sorted(layers.values())
    assert layers[0] == 0 and layers[29] == 17 and set(layers.values()) == set(range(18))
    assert map_layers(4, 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert map_layers(1, 5) == {0: 2}


def test_explicit_depth_map_is_checked():
    assert map_layers(3, 2, {0: 0, 2: 1}) == {0: 0, 2: 1}
    with pytest.raises(ValueError, match="source layer 2 to target layer 2"):
        map_layers(3, 2, {2: 2})
    with pytest.raises(ValueError, match="must be 'proportional'"):
        map_layers(3, 2, "nearest")


def names(layers, modules=("self_attn.q_proj", "mlp.down_proj")):
    return [f"model.layers.{i}.{module}" for i in range(layers) for module in modules]


def test_several_source_layers_share_a_target_module():
    target = tiny_model("gemma3", num_hidden_layers=2)
    mapped = map_modules(names(3), target, map_layers(3, 2))
    assert mapped.kernels["model.layers.0.self_attn.q_proj"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert sum(map(len, mapped.kernels.values())) == 6 and mapped.unmapped == ()


def test_same_role_under_another_name():
    target = tiny_model("opt")
    mapped = map_modules(names(3, ("self_attn.o_proj", "mlp.up_proj")), target, map_layers(3, 3))
    assert set(mapped.kernels) == {
        f"model.decoder.layers.{i}.{m}" for i in range(3) for m in ("self_attn.out_proj", "fc1")
    }


def test_one_name_with_two_roles():
    gpt2 = [f"transformer.h.0.{module}" for module in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    mapped = map_modules(gpt2, tiny_model(), {0: 0})
    places = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    assert mapped.kernels == {f"model.layers.0.{place}": [name] for place, name in zip(places, gpt2)}
    target = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2))
    assert map_modules(gpt2, target, {0: 0}).kernels == {name: [name] for name in gpt2}
    assert map_modules(["model.layers.0.mlp.down_proj"], target, {0: 0}).kernels.keys() == {gpt2[2]}


def test_modules_without_a_place_are_reported_by_name():
    mapped = map_modules(names(1, ("mlp.gate_proj", "mlp.up_proj")), tiny_model("opt"), map_layers(1, 3))
    assert mapped.unmapped == ("model.layers.0.mlp.gate_proj",)
    mapped = map_modules(names(3), tiny_model(), {0: 0, 1: 1})
    assert mapped.unmapped == ("model.layers.2.self_attn.q_proj", "model.layers.2.mlp.down_proj")


def test_user_given_module_map_and_nothing_to_map():
    unknown = ["blocks.0.mixer.weird"]
    with pytest.raises(ValueError, match="weird.*module_map"):
        map_modules(unknown, tiny_model(), {0: 0})
    with pytest.raises(
        ValueError, match="source layer 1 is left out of the depth map.*: name these layers in `depth_map`"
    ):
        map_modules(names(2)[2:], tiny_model(), {0: 0})
    mapped = map_modules(unknown, tiny_model(), {0: 0}, {"weird": "q_proj"})
    assert mapped.kernels == {"model.layers.0.self_attn.q_proj": unknown}


def test_all_linear_roles_are_known():
    mapped = map_modules([f"model.layers.1.x.{name}" for name in ALL_LINEAR], tiny_model("qwen3"), map_layers(3, 3))
    assert len(mapped.kernels) == 7 and not mapped.unmapped


def test_cka_knows_a_layer_again_in_another_basis():
    states = [torch.randn(60, 12) for _ in range(3)]
    turned = [s @ torch.linalg.qr(torch.randn(12, 12)).Q for s in states]
    similarity = linear_cka(states, turned)
    assert similarity.shape == (3, 3) and similarity.argmax(1).tolist() == [0, 1, 2]
    assert similarity.diagonal().min() > 0.9 > similarity[~torch.eye(3, dtype=torch.bool)].max() + 0.2
    torch.testing.assert_close(linear_cka(states, states).diagonal(), torch.ones(3))


def test_monotone_map_is_the_best_that_keeps_the_order():
    similarity = torch.tensor([[0.9, 0.1, 0.1], [0.2, 0.1, 0.9], [0.1, 0.8, 0.6], [0.1, 0.2, 0.7]])
    # layer 1 alone would take 2, layer 2 alone 1: together they may not cross
    assert monotone_map(similarity) == {0: 0, 1: 2, 2: 2, 3: 2}
    assert monotone_map(torch.eye(3)) == {0: 0, 1: 1, 2: 2}
    torch.manual_seed(1)
    for _ in range(20):
        random = torch.rand(4, 3)
        paths = [(a, b, c, d) for a in range(3) for b in range(a, 3) for c in range(b, 3) for d in range(c, 3)]
        best = max(paths, key=lambda path: sum(random[i, t] for i, t in enumerate(path)))
        assert tuple(monotone_map(random).values()) == best
