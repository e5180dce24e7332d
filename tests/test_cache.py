"""What a cache knows the files by that it was computed from."""

import os
import shutil

from sdprune_jax.data import cache


def test_directory_is_known_by_what_is_in_it(tmp_path, monkeypatch):
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
    monkeypatch.setattr(cache, "_LARGE", 2)
    large = cache.directory_state(here)
    assert large == cache.directory_state(here) != state
    os.utime(here / "unet" / "weights", ns=(1, 1))
    assert cache.directory_state(here) != large
