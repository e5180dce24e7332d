"""Pictures and prompts of stored datasets, as the router and the experts read them."""

import aptp_model
import numpy as np
import pytest
from PIL import Image

from sdprune_jax.data import cc3m, emoji, pictures
from sdprune_jax.stages import assign
from sdprune_jax.training import encoded


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Five pictures to train on and two others, of several shapes."""
    source = tmp_path_factory.mktemp("source")
    for split, count in (("train", 5), ("validation", 2)):
        tsv, folder = (source / name for name in cc3m.FILES[split])
        lines = [f"{split} {i}\thttp://example.com/{i}.jpg\n" for i in range(count)]
        tsv.write_text("".join(lines))
        folder.mkdir()
        for i in range(count):
            rng = np.random.default_rng([count, i])
            pixels = rng.integers(0, 256, (70 + 11 * i, 100 - 9 * i, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}_0.png")
        cc3m.prepare(source, source / "data", split)
    return pictures.PictureSource("cc3m", str(source / "data"), image_size=64)


def test_square_is_a_crop_of_the_resized_picture():
    image = np.tile(np.arange(0, 240, 4, np.uint8)[None, :, None], (30, 1, 3))
    seen = set()
    for seed in range(30):
        found = pictures.square(image, 30, np.random.default_rng(seed))
        np.testing.assert_array_equal(found, image[:, found[0, 0, 0] // 4 :][:, :30])
        seen.add(int(found[0, 0, 0]) // 4)
    assert min(seen) < 5  # of the places from 0 to 30
    assert max(seen) > 25
    small = pictures.square(image, 15, np.random.default_rng(0))
    assert small.shape == (15, 15, 3)
    # Two and two columns become one, less what the filter takes from their neighbours.
    columns = small[7, 1:-1, 0].astype(int)
    np.testing.assert_array_equal(np.diff(columns), 8)


def test_stored_pictures_are_read_by_rows_the_same_every_time(stored):
    train = pictures.load(stored, "train")
    assert (len(train.images), train.images.shape) == (5, (5, 64, 64, 3))
    found = train.images[np.array([4, 0, 4])]
    assert found.shape == (3, 64, 64, 3)
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(pictures.load(stored, "train").images[np.array([0])], found[1:2])
    texts = pictures.prompts(train, "train", 0, 2).texts
    assert texts == [f"train {i}" for i in range(5) for _ in range(2)]
    val = pictures.load(stored, "val")
    prompts = pictures.prompts(val, "val", 0, 2)
    assert prompts.texts == ["validation 0", "validation 1"]
    assert assign._labels(prompts) == {}
    assert pictures.state(val) != pictures.state(train)
    with pytest.raises(ValueError, match=r"set config\.router\.data\.directory"):
        pictures.load(pictures.PictureSource("cc3m"), "train")


def test_latents_of_stored_pictures_follow_them_and_their_mirror_images(
    stored, tmp_path, monkeypatch
):
    model, images = aptp_model.make(tmp_path / "model"), pictures.load(stored, "train")
    texts = pictures.prompts(images, "train", 0, 2).texts
    encoders = lambda cache_dir: encoded.Encoders(model, aptp_model.MESH, cache_dir)
    found = encoded.encode(encoders(tmp_path / "cache"), images, texts, flips=True)
    assert (found.mean.shape, found.states.shape[0]) == ((5, 2, 8, 8, 4), 10)
    for row, flip in ((0, 0), (3, 1)):
        image = images.images[np.array([row])][:, :, :: 1 - 2 * flip]
        alone = emoji.Pairs(image, *np.zeros((2, 1), np.int32))
        own = encoded.encode(encoders(None), alone, ["a cat"])
        np.testing.assert_allclose(found.mean[row, flip], own.mean[0, 0], rtol=0, atol=1e-5)
    monkeypatch.setattr(encoded, "_IN_MEMORY", 0)  # as of a large dataset
    on_disk = encoded.encode(encoders(tmp_path / "other"), images, texts, flips=True)
    np.testing.assert_array_equal(on_disk.mean, found.mean)
    np.testing.assert_array_equal(on_disk.states, found.states)
    assert not [path for path in (tmp_path / "other").iterdir() if path.is_file()]
