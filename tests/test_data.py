"""The embedded dataset, its captions and CLIP's tokenizer."""

import collections
import itertools
import subprocess
import sys

import numpy as np
import pytest

from sdprune_jax.data import captions, emoji, tokenizer

TEXTS = [captions.caption(concept) for concept in emoji.concepts()[::6]]
APPLE = emoji.Concept("red apple", ("apple", "fruit", "red", "food"), "food & drink", "fruit")
FLAG = emoji.Concept("flag: Kenya", ("KE", "flag"), "flags", "country flags")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    emoji.prepare(directory)
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    return directory, tokenizer.train(TEXTS, directory, vocab_size=800, max_length=24)


def test_index_names_every_concept_and_style_once():
    labels = [concept.label for concept in emoji.concepts()]
    assert len(labels) == len(set(labels)) == 1914
    words = "glossy flat 3d noto blob firefox twitter emojione"
    assert [style.word for style in emoji.styles()] == words.split()
    assert {style.licence for style in emoji.styles()} == {"MIT", "Apache-2.0", "CC-BY-4.0"}
    apple = next(concept for concept in emoji.concepts() if concept.label == "red apple")
    assert (apple.group, apple.subgroup) == ("food & drink", "fruit")
    assert {"fruit", "red"} <= set(apple.tags)


def test_splits_hold_out_whole_concepts_and_single_styles():
    splits = {split: set() for split in emoji.SPLITS}
    for (concept, style), split in emoji.split_of().items():
        splits[split].add((concept, style))
    assert {split: len(pairs) for split, pairs in splits.items()} == {
        "train": 10178,
        "val": 526,
        "test": 609,
    }
    of = {split: {concept for concept, _ in pairs} for split, pairs in splits.items()}
    assert not of["test"] & (of["train"] | of["val"])
    assert of["val"] <= of["train"]


def test_dataset_can_be_written_by_two_runs_at_a_time(tmp_path, monkeypatch):
    generate = emoji.EmojiCaptions._generate_examples
    rivals = [lambda: emoji.prepare(tmp_path)]

    def few(self, split):
        if rivals:
            rivals.pop()()  # begins after us, and ends before
        yield from itertools.islice(generate(self, split), 2)

    monkeypatch.setattr(emoji.EmojiCaptions, "_generate_examples", few)
    builder = emoji.prepare(tmp_path)
    assert len(builder.as_data_source("train")) == 2
    assert not list(tmp_path.rglob("incomplete*"))


def test_stored_pictures_equal_the_sheets(cache_dir):
    tiles = dict(zip(emoji.split_of(), emoji._tiles(), strict=True))
    seen = collections.Counter()
    for split in emoji.SPLITS:
        pairs = emoji.load(split, cache_dir)
        assert (pairs.images.dtype, pairs.concept.dtype) == (np.uint8, np.int32)
        for image, concept, style in zip(*pairs, strict=True):
            assert emoji.split_of()[int(concept), int(style)] == split
            assert np.array_equal(image, tiles[int(concept), int(style)])
            seen[int(concept), int(style)] += 1
    assert set(seen) == set(tiles)
    assert set(seen.values()) == {1}
    apple = next(pair for pair in tiles if emoji.concepts()[pair[0]].label == "red apple")
    red, green, blue = tiles[apple][40, 24]
    assert red > 150 > max(green, blue)


def test_reading_needs_no_tensorflow(cache_dir):
    code = f"""
import sys
from sdprune_jax.data import emoji
row = emoji.prepare({str(cache_dir)!r}).as_data_source("test")[7]
assert row["image"].shape == (64, 64, 3), row
assert row["label"].decode() == emoji.concepts()[row["concept_id"]].label
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of train, val, test, got 'dev'"):
        emoji.load("dev", tmp_path)


def test_captions_read_as_english():
    assert captions.caption(APPLE, "flat") == "a flat emoji of red apple"
    assert captions.caption(APPLE, "emojione") == "an emojione emoji of red apple"
    assert captions.caption(APPLE) == "an emoji of red apple"
    assert captions.caption(FLAG, "3d") == "a 3d emoji of the flag of Kenya"


def test_augmented_captions_vary_but_follow_the_generator():
    def draw():
        rng = np.random.default_rng(0)
        return [captions.augmented(rng, APPLE, "flat") for _ in range(2000)]

    drawn = draw()
    assert drawn == draw()
    count = collections.Counter(drawn)
    assert 0.3 < count["a flat emoji of red apple"] / 2000 < 0.45
    # fmt: off
    assert count.keys() >= {
        "an emoji of red apple", "red apple", "red apple, flat style",
        "a flat drawing of red apple", "a flat emoji of red apple, fruit, food",
        "a flat emoji of food, fruit",
    }
    # fmt: on
    assert not any("red apple, red" in text or "None" in text for text in drawn)


def test_state_of_prompts_is_that_of_their_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat")
    before = captions.state(str(path))
    path.write_text("a dog")
    assert captions.state(str(path)) != before
    assert captions.state("embedded") == "embedded"


def test_empty_lines_are_no_prompts_and_a_file_without_any_is_refused(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("\ufeffa red apple\r\n\r\n   \n an owl \nthird\n", encoding="utf-8")
    assert captions.prompts(str(file), "train", 2, 0) == ["a red apple", "an owl"]
    file.write_text(" \n\n")
    with pytest.raises(ValueError, match=r"captions\.txt has no prompt: write one a line"):
        captions.prompts(str(file), "train", 2, 0)
    with pytest.raises(ValueError, match="which is no file"):
        captions.prompts(str(tmp_path / "none.txt"), "train", 2, 0)


def test_vocabulary_has_clips_layout(trained):
    directory, tok = trained
    assert len(tok) == 800
    ids = [tok.convert_tokens_to_ids(token) for token in ("!", "~", "Ń", "!</w>", "Ń</w>")]
    assert ids == [0, 93, 255, 256, 511]
    assert (tok.pad_token_id, tok.bos_token_id, tok.eos_token_id) == (0, 798, 799)
    ranks = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert len(ranks) == 1 + 800 - 512 - 2
    assert tok.convert_ids_to_tokens(512) == ranks[1].replace(" ", "")


def test_training_is_reproducible(trained, tmp_path):
    directory, _ = trained
    tokenizer.train(TEXTS, tmp_path, vocab_size=800, max_length=24)
    for path in directory.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_encode_frames_pads_and_truncates(trained):
    _, tok = trained
    ids = tokenizer.encode(tok, ["an emoji", "", "An EMOJI of a cat " * 9], max_length=12)
    assert ids.dtype == np.int32
    an, emoji_id = (tok.convert_tokens_to_ids(word + "</w>") for word in ("an", "emoji"))
    assert ids[0].tolist() == [798, an, emoji_id, 799] + [0] * 8
    assert ids[1].tolist() == [798, 799] + [0] * 10
    assert ids[2, :3].tolist() == [798, an, emoji_id]
    assert ids[2, -1] == 799
    assert np.count_nonzero(ids[2]) == 12


def test_any_text_becomes_seventy_seven_tokens(trained, caplog):
    _, tok = trained
    texts = [
        "",
        "x" * 10_000,
        "nul\0",
        "\u05e9\u05dc\u05d5\u05dd \u202e",
        "\U0001f469\u200d\U0001f467",
        "<|endoftext|>",
        "<|startoftext|> b <|endoftext|> b",
        "!!!",
        "\x85 \u2028",
    ]
    with caplog.at_level("WARNING", "absl"):
        ids = tokenizer.encode(tok, texts, 77)
    assert ids.shape == (9, 77)
    assert caplog.messages == ["1 of 9 texts have over 77 tokens: cut"]
    assert (ids[:, 0] == 798).all()
    assert (ids < 800).all()
    assert ((ids == 799).sum(axis=1) == [1, 1, 1, 1, 1, 2, 2, 1, 1]).all()
    assert np.count_nonzero(ids[1]) == 77  # no pad: the end is the last of all
    for row in (0, 8):
        assert ids[row].tolist() == [798, 799] + [0] * 75


def test_a_tokenizer_saved_by_transformers_is_read_back(trained, tmp_path):
    _, tok = trained
    assert tok.model_max_length == 24
    texts = [*TEXTS[::20], "Piñata, it's  «São Tomé» 2024!", "!", "", "UP! \n <|endoftext|> b"]
    tok.save_pretrained(tmp_path)  # in the layout of the installed transformers
    reread = tokenizer.load(tmp_path)
    want = tokenizer.encode(tok, texts, 24)
    np.testing.assert_array_equal(tokenizer.encode(reread, texts, 24), want)
    assert want[-2].tolist() == [798, 799] + [0] * 22
    assert len(reread) == 800


def test_too_small_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must exceed 514"):
        tokenizer.train(TEXTS, tmp_path, vocab_size=514)


def test_directory_without_a_tokenizer_is_refused(trained, tmp_path):
    (tmp_path / "vocab.json").write_bytes((trained[0] / "vocab.json").read_bytes())
    with pytest.raises(ValueError, match=r"must have vocab\.json .*; found vocab\.json$"):
        tokenizer.load(tmp_path)
