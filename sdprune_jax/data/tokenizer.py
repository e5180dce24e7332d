"""CLIP's tokenizer: byte-level BPE of lower-cased words; trained here, or read from a directory.

Source: CLIP, ICML 2021, section 2.4 (https://arxiv.org/abs/2103.00020); the layout of the
vocabulary and of the files is that of Stable Diffusion's `tokenizer/` directory.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
import transformers
from absl import logging
from jaxtyping import Int32
from tokenizers import models, normalizers, pre_tokenizers, trainers

from sdprune_jax import UserError

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
WORD_END = "</w>"
# Contractions, runs of letters, single digits, runs of anything else but space.
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def train(
    texts: Iterable[str],
    directory: str | os.PathLike[str],
    vocab_size: int = 2048,
    max_length: int = 77,
) -> transformers.CLIPTokenizer:
    """Learns merges from `texts` and writes the four files of a `tokenizer/` directory.

    A vocabulary is 512 single bytes (inside and at the end of a word), merges, and two marks;
    a small corpus yields fewer than `vocab_size` tokens. `max_length` is noted in the files.

    Raises:
        ValueError: if `vocab_size` leaves no room for a merge.
    """
    alphabet = _byte_symbols()
    base = [*alphabet, *(symbol + WORD_END for symbol in alphabet)]
    if vocab_size < len(base) + 3:
        raise UserError(
            f"vocab_size must exceed {len(base) + 2} (single bytes and marks), got {vocab_size}"
        )
    bpe = _untrained(models.BPE(end_of_word_suffix=WORD_END))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        # Given the bytes as special tokens, the trainer numbers them in this order. It would
        # number word ends at random otherwise, and ties between merges fall by these numbers.
        special_tokens=base,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), START, END]
    vocab = {token: index for index, token in enumerate(tokens)}

    mark = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start, end = {"content": START, **mark}, {"content": END, **mark}
    special = {"bos_token": start, "eos_token": end, "pad_token": PAD, "unk_token": end}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": max_length,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "vocab.json": vocab,
        "special_tokens_map.json": special,
        "tokenizer_config.json": config,
    }
    for name, content in contents.items():
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load(folder)


def load(directory: str | os.PathLike[str]) -> transformers.CLIPTokenizer:
    """Reads the `tokenizer/` directory of a diffusers pipeline, as any version of it is saved.

    Raises:
        ValueError: if files are missing.
    """
    folder = pathlib.Path(directory)
    forms = (("vocab.json", "merges.txt"), ("tokenizer.json", "tokenizer_config.json"))
    if not any(all((folder / name).is_file() for name in form) for form in forms):
        raise UserError(
            f"{folder} is no tokenizer/ directory of a diffusers pipeline: it must have"
            f" {' or '.join(' and '.join(form) for form in forms)};"
            f" found {', '.join(sorted(path.name for path in folder.glob('*'))) or 'nothing'}"
        )
    return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def encode(
    tokenizer: transformers.CLIPTokenizer,
    texts: Sequence[str],
    max_length: int,
    *,
    warns: bool = True,
) -> Int32[np.ndarray, "n max_length"]:
    """Start, text, end and padding; a longer text loses its last words, not its end.

    How many do is said in a warning, if it `warns`.

    Stable Diffusion 2 pads with "!", and so swallows every "!" of a text.
    """
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=max_length)
    ids = np.array(found["input_ids"], np.int32)
    if warns:  # most texts end before the last place: no need to look at them again
        full = [
            text for text, row in zip(texts, ids, strict=True) if row[-1] == tokenizer.eos_token_id
        ]
        whole = tokenizer(full, verbose=False)["input_ids"] if full else []
        if cut := sum(len(row) > max_length for row in whole):
            logging.warning("%d of %d texts have over %d tokens: cut", cut, len(ids), max_length)
    return ids


def _untrained(model: models.BPE) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(model)
    bpe.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    words = pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    return bpe


def _byte_symbols() -> list[str]:
    """Returns the 256 characters that stand for bytes, in CLIP's order: visible bytes first."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)}
    hidden = len(set(range(256)) - visible)  # drawn as the characters from 256 on
    return [chr(code) for code in (*sorted(visible), *range(256, 256 + hidden))]
