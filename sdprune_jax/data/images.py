"""Image files as arrays, and the rules by which each protocol of evaluation resizes them.

A rule is part of a protocol: the same images under two rules have two FIDs.
"""

import functools
import io
import os
import pathlib
import struct
from collections.abc import Callable, Mapping

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Float32, UInt8

from sdprune_jax import UserError

Image = UInt8[np.ndarray, "h w 3"]
Resized = Float32[np.ndarray, "size size 3"]  # in [0, 255]

_BICUBIC = PIL.Image.Resampling.BICUBIC
_MAX_ASPECT = 64  # longer over shorter side
# What Pillow raises, besides its own errors, for files that are damaged.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    PIL.Image.DecompressionBombError,
)


def load(path: str | os.PathLike[str]) -> Image:
    """Reads the image in a file, as `decode`.

    Raises:
        ValueError: naming the file, if there is none, or as `decode`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file, expected an image")
    return decode(path.read_bytes(), str(path))


def decode(contents: bytes, name: str) -> Image:
    """Reads an image as RGB: turned upright as its EXIF says, transparency over white.

    Of an animation it is the first frame. Colour profiles are ignored, as in the papers.

    Args:
        contents: bytes of a file in any format that Pillow reads.
        name: for errors.

    Raises:
        ValueError: naming the image, if it is none, damaged, cut short, of more pixels than Pillow
            decodes (179 million), or of a mode without a known range.
    """
    try:
        with PIL.Image.open(io.BytesIO(contents)) as image:
            image.load()
            return _rgb(PIL.ImageOps.exif_transpose(image))
    except PIL.UnidentifiedImageError as error:
        start = f"its {len(contents)} bytes start with {contents[:32]!r}"
        raise UserError(f"{name} is no image: {start if contents else 'it is empty'}") from error
    except _DAMAGED as error:
        raise UserError(f"{name} is no image that can be read: {error}") from error


def clean(image: Image, size: int) -> Resized:
    """Bicubic with antialiasing, in float32 and never rounded.

    Source: Parmar et al. 2022 (https://arxiv.org/abs/2104.11222); clean-fid's `clean`.
    """
    planes = np.moveaxis(image, -1, 0).astype(np.float32)
    planes = [PIL.Image.fromarray(x).resize((size, size), _BICUBIC) for x in planes]
    return np.stack([np.asarray(x) for x in planes], axis=-1).clip(0, 255)


def pil_bicubic(image: Image, size: int) -> Resized:
    """Bicubic with antialiasing, rounded to bytes."""
    return np.asarray(PIL.Image.fromarray(image).resize((size, size), _BICUBIC), np.float32)


def clip(image: Image, size: int) -> Resized:
    """The shorter side by `pil_bicubic`, then the middle square.

    Source: OpenAI's CLIP (https://arxiv.org/abs/2103.00020); open_clip evaluates so too.
    """
    short = min(image.shape[:2])
    # Of a very long image only the middle is seen, and the rest would take gigabytes.
    cut_h, cut_w = (max(0, n - _MAX_ASPECT * short) // 2 for n in image.shape[:2])
    h, w = image.shape[0] - 2 * cut_h, image.shape[1] - 2 * cut_w
    image = image[cut_h : cut_h + h, cut_w : cut_w + w]
    new_h, new_w = (int(size * n / short) for n in (h, w))
    resized = np.asarray(PIL.Image.fromarray(image).resize((new_w, new_h), _BICUBIC), np.float32)
    top, left = (round((n - size) / 2) for n in (new_h, new_w))
    return resized[top : top + size, left : left + size]


def cmmd(image: Image, size: int) -> Resized:
    """The middle square, then `pil_bicubic`.

    Source: Jayasumana et al. 2024 (https://arxiv.org/abs/2401.09603) and their code.
    """
    h, w = image.shape[:2]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    return pil_bicubic(image[top : top + side, left : left + side], size)


def legacy_pytorch(image: Image, size: int) -> Resized:
    """Bilinear between pixel centres, without antialiasing; pytorch-fid resizes so."""
    return _resized_by(_between_centres, image, size)


def legacy_tf(image: Image, size: int) -> Resized:
    """Bilinear between the corners of pixels, without antialiasing.

    The images move by up to half a pixel: a slip of TensorFlow 1 that the first FIDs share.
    """
    return _resized_by(_between_corners, image, size)


def antialias(image: Image, size: int) -> Resized:
    """Bilinear with antialiasing, as torchmetrics resizes unless told otherwise."""
    return _resized_by(_triangles, image, size)


RESIZE: Mapping[str, Callable[[Image, int], Resized]] = {
    "clean": clean,
    "legacy_pytorch": legacy_pytorch,
    "legacy_tf": legacy_tf,
    "antialias": antialias,
    "clip": clip,
    "cmmd": cmmd,
    "pil_bicubic": pil_bicubic,
}

# (pixels before, pixels after) -> the weight of each pixel before in each after
_Weights = Callable[[int, int], Float32[np.ndarray, "n_out n_in"]]


def _rgb(image: PIL.Image.Image) -> Image:
    if image.mode == "F":
        raise UserError("its pixels are floats of no known range: save it with 8 bits a channel")
    if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise UserError("its pixels exceed 16 bits: save it with 8 bits a channel")
        gray = ((gray * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _resized_by(weights: _Weights, image: Image, size: int) -> Resized:
    """Resizes every row and every column by one matrix each."""
    h, w = image.shape[:2]
    planes = np.moveaxis(image, -1, 0).astype(np.float32)
    planes = weights(h, size) @ planes @ weights(w, size).T
    return np.moveaxis(planes, 0, -1).clip(0, 255)


# Positions are rounded to float32 because PyTorch and TensorFlow round them.


@functools.lru_cache(32)
def _between_centres(n_in: int, n_out: int) -> Float32[np.ndarray, "n_out n_in"]:
    scale = np.float32(n_in) / np.float32(n_out)
    return _two_taps(scale * (np.arange(n_out, dtype=np.float32) + 0.5) - 0.5, n_in)


@functools.lru_cache(32)
def _between_corners(n_in: int, n_out: int) -> Float32[np.ndarray, "n_out n_in"]:
    scale = np.float32(n_in) / np.float32(n_out)
    return _two_taps(scale * np.arange(n_out, dtype=np.float32), n_in)


@functools.lru_cache(32)
def _triangles(n_in: int, n_out: int) -> Float32[np.ndarray, "n_out n_in"]:
    scale = n_in / n_out
    centre = scale * (np.arange(n_out)[:, None] + 0.5)
    distance = np.abs(np.arange(n_in) + 0.5 - centre) / max(scale, 1)
    weights = np.maximum(0, 1 - distance)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _two_taps(
    position: Float32[np.ndarray, " n_out"], n_in: int
) -> Float32[np.ndarray, "n_out n_in"]:
    """Weights of the two pixels around each position; the first and last go on beyond the edge."""
    position = position.clip(0, n_in - 1)
    low = np.minimum(position.astype(int), max(0, n_in - 2))
    share, rows = position - low.astype(np.float32), np.arange(len(position))
    weights = np.zeros((len(position), n_in), np.float32)
    weights[rows, low] = 1 - share
    if n_in > 1:
        weights[rows, low + 1] = share
    return weights
