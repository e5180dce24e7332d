"""What a cache knows the files by that it was computed from."""

import os
import shutil

import numpy as np

from sdprune_jax.data import cache


def test_fingerprint_tells_names_and_what_is_missing_apart():
    inputs = [{"text": 1, "unet": None}, {"text": None, "unet": 1}, {"text": 1}, {"unet": 1}]
    inputs += [[1, None], [None, 1], [1], np.ones(1), np.ones((1, 1)), np.ones(1, np.float32)]
    assert len({cache.fingerprint(x) for x in inputs}) == len(inputs)
    assert cache.fingerprint({"a": 1, "b": (2, 3)}) == cache.fingerprint({"b": (2, 3), "a": 1})


def test_rows_of_a_mean_weigh_the_same():
    rows = lambda *asked: [batch.tolist() for batch in cache.in_whole_batches(*asked)]
    assert rows(7, 3, 9) == [[0, 1, 2], [3, 4, 5]]
    assert rows(9, 3, 2) == [[0, 1, 2], [3, 4, 5]]
    assert rows(2, 4, 9) == [[0, 1, 0, 1]]
    assert rows(0, 4, 9) == []


def test_directory_is_known_by_what_is_in_it(tmp_path):
    here, copy = tmp_path / "here", tmp_path / "copy"
    (here / "unet").mkdir(parents=True)
    (here / "unet" / "weights").write_bytes(b"abc")
    state = cache.directory_state(here)
    shutil.copytree(here, copy, copy_function=shutil.copyfile)
    os.utime(copy / "unet" / "weights", ns=(1, 1))
    assert cache.directory_state(copy) == state  # a new clone is no other model
    (copy / "unet" / "weights").write_bytes(b"abd")
    assert cache.directory_state(copy) != state
    (copy / "unet" / "weights").rename(copy / "weights")
    (copy / "weights").write_bytes(b"abc")
    assert cache.directory_state(copy) != state


def test_arrays_that_were_damaged_are_computed_again(tmp_path):
    made = []

    def compute():
        made.append(1)
        return {"a": np.arange(6)}

    for _ in range(2):
        assert cache.cached(tmp_path, "latents", "k", compute)["a"].sum() == 15
    path = tmp_path / "latents-k" / "a.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert cache.cached(tmp_path, "latents", "k", compute)["a"].sum() == 15
    assert len(made) == 2
