"""Reading of image files, and every rule of resizing against PyTorch, Pillow or its formula."""

import struct
import zlib

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import transformers

from sdprune_jax.data import images
from sdprune_jax.models import clip

RESIZE = images.RESIZE
SHAPES = {"smaller": (50, 37), "larger": (7, 9), "both": (9, 40), "same": (16, 16), "dot": (1, 1)}
SIZE = 16


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def image(request):
    h, w = request.param
    return np.random.default_rng(h).integers(0, 256, size=(h, w, 3)).astype(np.uint8)


def _save(path, array, mode, **kwargs):
    array = np.asarray(array)
    image = PIL.Image.frombytes(mode, array.shape[1::-1], array.tobytes())
    for key, value in kwargs.pop("info", {}).items():
        getattr(image, key)(*value)
    image.save(path, **kwargs)
    return path


# Rules of resizing


@pytest.mark.parametrize(("rule", "smooth"), [("legacy_pytorch", False), ("antialias", True)])
def test_bilinear_rules_equal_torch(image, rule, smooth):
    torch = pytest.importorskip("torch")
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    want = torch.nn.functional.interpolate(
        planes, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=smooth
    )
    got = RESIZE[rule](image, SIZE)
    np.testing.assert_allclose(got, want[0].permute(1, 2, 0), rtol=0, atol=1e-3)


def test_legacy_tf_takes_corners_for_centres(image):
    def resize_rows(x):
        positions = [i * len(x) / SIZE for i in range(SIZE)]
        at = lambda i: x[min(int(i), len(x) - 1)]
        return [at(p) * (1 - p % 1) + at(p + 1) * (p % 1) for p in positions]

    rows = np.array(resize_rows(image.astype(float)))
    want = np.array(resize_rows(rows.transpose(1, 0, 2))).transpose(1, 0, 2)
    np.testing.assert_allclose(RESIZE["legacy_tf"](image, SIZE), want, rtol=0, atol=1e-3)
    ramp = np.full((2, 2, 3), 7, np.uint8)
    ramp[:, 1] = 107
    got = RESIZE["legacy_tf"](ramp, 4)
    np.testing.assert_array_equal(got[2, :, 1], [7, 57, 107, 107])


def _bicubic(image, after_each_axis):
    """By the formula, in float64: Keys' cubic of parameter -1/2, wider where pixels merge."""

    def weights(n_in):
        scale = n_in / SIZE
        centre = (np.arange(SIZE)[:, None] + 0.5) * scale
        x = np.abs(np.arange(n_in) + 0.5 - centre) / max(scale, 1)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        y = np.where(x < 1, near, np.where(x < 2, far, 0))
        return y / y.sum(axis=1, keepdims=True)

    x = after_each_axis(np.einsum("hwc,jw->hjc", image, weights(image.shape[1])))
    return after_each_axis(np.einsum("hjc,ih->ijc", x, weights(image.shape[0]))).clip(0, 255)


def test_clean_is_bicubic_and_never_rounded(image):
    got = RESIZE["clean"](image, SIZE)
    np.testing.assert_allclose(got, _bicubic(image, lambda x: x), rtol=0, atol=1e-3)


def test_pil_bicubic_is_rounded_after_each_axis(image):
    got = RESIZE["pil_bicubic"](image, SIZE)
    np.testing.assert_array_equal(got, np.round(got))
    want = _bicubic(image, lambda x: np.floor(x + 0.5).clip(0, 255))
    np.testing.assert_allclose(got, want, rtol=0, atol=1)
    assert (got == want).mean() > 0.99


def test_clip_resizes_the_shorter_side_and_cmmd_crops_first():
    image = np.random.default_rng(0).integers(0, 256, size=(47, 30, 3)).astype(np.uint8)
    whole = PIL.Image.fromarray(image).resize((16, 25), PIL.Image.Resampling.BICUBIC)
    want = np.asarray(whole.crop((0, 4, 16, 20)))  # half of 25 - 16, to the even number
    np.testing.assert_array_equal(RESIZE["clip"](image, 16), want)
    turned = RESIZE["clip"](image.transpose(1, 0, 2), 16).transpose(1, 0, 2)
    np.testing.assert_allclose(turned, want, rtol=0, atol=1)  # Pillow rounds between the axes
    np.testing.assert_array_equal(RESIZE["cmmd"](image, 16), RESIZE["pil_bicubic"](image[8:38], 16))
    square = image[:30]
    np.testing.assert_array_equal(RESIZE["clip"](square, 16), RESIZE["cmmd"](square, 16))


def test_input_of_clip_equals_transformers():
    image = np.random.default_rng(0).integers(0, 256, size=(47, 31, 3)).astype(np.uint8)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    want = processor(images=PIL.Image.fromarray(image), return_tensors="np")["pixel_values"]
    got = clip.preprocess(jnp.asarray(RESIZE["clip"](image, 16))[None])
    np.testing.assert_allclose(got, want.transpose(0, 2, 3, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", RESIZE)
def test_every_rule_keeps_a_colour_and_takes_any_shape(rule):
    for shape in ((1, 1), (1, 10_000), (10_000, 1), (5, 8), (24, 24)):
        got = RESIZE[rule](np.full((*shape, 3), (3, 200, 255), np.uint8), 24)
        assert (got.shape, got.dtype) == ((24, 24, 3), np.float32)
        assert got.min() >= 0
        assert got.max() <= 255
        np.testing.assert_allclose(got[11, 13], [3, 200, 255], rtol=0, atol=1e-3)


def test_clip_sees_the_middle_of_a_long_image():
    image = np.zeros((1, 10_001, 3), np.uint8)
    image[:, 5000] = 255
    got = RESIZE["clip"](image, 8)
    np.testing.assert_allclose(got, RESIZE["clip"](image[:, 4990:5011], 8), rtol=0, atol=1)
    assert got[:, 4].min() > 200


# Files


def _exif(orientation):
    exif = PIL.Image.Exif()
    exif[0x112] = orientation
    return exif


def test_modes_become_rgb(tmp_path):
    gray = np.array([[0, 7, 255]], np.uint8)
    repeated = np.repeat(gray[..., None], 3, axis=-1)
    png, tiff = tmp_path / "a.png", tmp_path / "a.tiff"

    def loaded(*args, **kwargs):
        return images.load(_save(*args, **kwargs)).tolist()

    assert loaded(png, gray, "L") == repeated.tolist()
    wide = np.array([[128, 7 * 257 - 128, 65535]], "<u2")  # to the nearest of 256 levels
    assert loaded(png, wide, "I;16") == repeated.tolist()
    assert loaded(tiff, wide.astype(np.int32), "I") == repeated.tolist()
    colours = [[[10, 20, 30], [40, 50, 60]]]
    assert loaded(png, np.array(colours, np.uint8), "RGB") == colours
    ink = np.array([[[100, 0, 200, 0], [0, 0, 0, 255]]], np.uint8)
    assert loaded(tiff, ink, "CMYK") == [[[155, 255, 55], [0, 0, 0]]]
    printed = loaded(tmp_path / "a.jpg", np.tile(ink[:, :1], (16, 16, 1)), "CMYK")
    np.testing.assert_allclose(printed[8][8], [155, 255, 55], rtol=0, atol=2)  # stored inverted
    palette = {"info": {"putpalette": ([10, 20, 30, 40, 50, 60],)}}
    indices = np.array([[0, 1]], np.uint8)
    assert loaded(png, indices, "P", **palette) == colours
    assert loaded(tmp_path / "a.gif", indices, "P", **palette) == colours


def test_transparent_pixels_are_over_white(tmp_path):
    path = tmp_path / "a.png"
    rgba = np.array([[[10, 20, 30, 255], [0, 51, 255, 51], [9, 9, 9, 0]]], np.uint8)
    want = [[[10, 20, 30], [204, 214, 255], [255, 255, 255]]]
    np.testing.assert_allclose(images.load(_save(path, rgba, "RGBA")), want, atol=1)
    want = [[[20] * 3, [214] * 3, [255] * 3]]
    np.testing.assert_allclose(images.load(_save(path, rgba[..., [1, 3]], "LA")), want, atol=1)
    palette = {"info": {"putpalette": ([10, 20, 30, 40, 50, 60],)}}
    indices = np.array([[0, 1]], np.uint8)
    got = images.load(_save(path, indices, "P", transparency=b"\xff\x00", **palette))
    assert got.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_photographs_are_turned_upright(tmp_path):
    array = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    turns = {1: array, 3: array[::-1, ::-1], 6: np.rot90(array, -1), 8: np.rot90(array)}
    for orientation, want in turns.items():
        path = _save(tmp_path / "a.png", array, "RGB", exif=_exif(orientation))
        np.testing.assert_array_equal(images.load(path), want)


def _png(width, height):
    """The start of a PNG that says how large it is."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    pack = lambda n: struct.pack(">I", n)
    parts = [pack(len(x)) + name + x + pack(zlib.crc32(name + x)) for name, x in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", "start with b'<html>"),
        (_png(20_000, 20_000), "decompression bomb"),
        (_png(4, 4), "truncated"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "no image"),
    ],
    ids=["empty", "web page", "bomb", "no pixels", "cut short"],
)
def test_files_that_are_no_images_are_named(tmp_path, data, message):
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad\.jpg.*{message}"):
        images.load(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_half_a_file_is_refused(tmp_path, suffix):
    array = np.random.default_rng(0).integers(0, 256, size=(40, 30, 3)).astype(np.uint8)
    path = _save(tmp_path / f"a.{suffix}", array, "RGB")
    assert images.load(path).shape == array.shape
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"a\.{suffix}"):
        images.load(path)


@pytest.mark.parametrize(
    ("values", "mode", "message"), [([[0.5]], "F", "floats"), ([[70_000]], "I", "16 bits")]
)
def test_pixels_of_unknown_range_are_refused(tmp_path, values, mode, message):
    values = np.array(values, np.float32 if mode == "F" else np.int32)
    path = _save(tmp_path / "a.tiff", values, mode)
    with pytest.raises(ValueError, match=rf"a\.tiff.*{message}"):
        images.load(path)
    with pytest.raises(ValueError, match="is no file"):
        images.load(tmp_path)
