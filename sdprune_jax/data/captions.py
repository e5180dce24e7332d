"""Captions of the embedded dataset: one canonical form, and variations of it for training."""

import hashlib
import pathlib

import numpy as np
from jaxtyping import Int32

from sdprune_jax import UserError
from sdprune_jax.data import emoji
from sdprune_jax.data.emoji import Concept

CANONICAL = "{article} {style} emoji of {name}"
UNSTYLED = "an emoji of {name}"
VARIATIONS = (
    CANONICAL,
    UNSTYLED,
    "{article} {style} drawing of {name}",
    "a picture of {name} in {style} style",
    "{name}, {style} style",
    "{name}, {style} emoji",
    "{name}",
)


def caption(concept: Concept, style: str | None = None) -> str:
    """Returns "a flat emoji of red apple", or "an emoji of red apple" without a style."""
    return _fill(CANONICAL if style else UNSTYLED, _name(concept), style)


def augmented(rng: np.random.Generator, concept: Concept, style: str) -> str:
    """Draws a caption: half are canonical, a third gain tags, 4% have tags instead of the label."""
    template = CANONICAL if rng.random() < 0.5 else VARIATIONS[rng.integers(len(VARIATIONS))]
    tags = [str(tag) for tag in rng.permutation(_new_tags(concept))]
    if len(tags) > 1 and rng.random() < 0.04:
        return _fill(template, ", ".join(tags[:3]), style)
    num_tags = rng.choice(3, p=(0.66, 0.17, 0.17))
    return ", ".join([_fill(template, _name(concept), style), *tags[:num_tags]])


def drawn(
    split: str, count: int, seed: int
) -> tuple[list[str], Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
    """Canonical captions of pictures drawn from a split, and their concepts and styles.

    The first of a longer draw by the same seed; fewer than `count` if the split has no more.
    """
    pairs = [pair for pair, its_split in emoji.split_of().items() if its_split == split]
    order = np.random.default_rng(seed).permutation(len(pairs))[:count]
    concept, style = np.array([pairs[i] for i in order], np.int32).T
    texts = [
        caption(emoji.concepts()[c], emoji.styles()[s].word)
        for c, s in zip(concept, style, strict=True)
    ]
    return texts, concept, style


def read(path: str, count: int) -> list[str]:
    """The first prompts of a text file, one a line.

    Raises:
        ValueError: if there is no such file, or no prompt in it.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(
            f"prompts are {path!r}, which is no file: give a text file with one prompt a line, or"
            " `embedded`"
        )
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    found = [line.strip() for line in lines if line.strip()][:count]
    if not found:
        raise UserError(f"{file} has no prompt: write one a line")
    return found


def prompts(source: str, split: str, count: int, seed: int) -> list[str]:
    """Texts of a file or, for `embedded`, drawn captions of a split."""
    return drawn(split, count, seed)[0] if source == "embedded" else read(source, count)


def state(source: str) -> str:
    """Changes whenever the prompts of `source` may."""
    file = pathlib.Path(source)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else source


def _fill(template: str, name: str, style: str | None) -> str:
    article = "an" if style and style[0] in "aeiou" else "a"
    return template.format(article=article, style=style, name=name)


def _name(concept: Concept) -> str:
    """Returns the label, but "the flag of Kenya" for "flag: Kenya"."""
    return concept.label.replace("flag: ", "the flag of ")


def _new_tags(concept: Concept) -> list[str]:
    """Returns the tags that say more than the label."""
    return [tag for tag in concept.tags if tag.lower() not in concept.label.lower()]
