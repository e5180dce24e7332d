"""Features of a set of images: the same bits on any mesh, from any number of processes.

The last bits of a feature depend on the shapes that its program was compiled for, and on nothing
else: not on its row nor on the other rows. So a device always computes `CHUNK` images at once, and
devices, processes and loading only decide how many chunks are under way.
"""

import collections
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Num
from tqdm import tqdm

from sdprune_jax import NotFiniteError, UserError, sharding
from sdprune_jax.data import cache

CHUNK = 32  # images a device computes at once; another number is another result

Params = Any
Embed = Callable[[Params, Num[Array, "b ..."]], Float[Array, "b d"]]
Load = Callable[[Int[np.ndarray, " b"]], Num[np.ndarray, "b ..."]]

_NUM_AHEAD = 2  # batches that are loaded while the devices compute


def stream(
    embed: Embed, params: Params, load: Load, num_images: int, mesh: Mesh, *, num_threads: int = 4
) -> Iterator[Float[np.ndarray, "b d"]]:
    """Yields the features of images 0, 1, … in order, every image once, in every process.

    Memory does not grow with the number of images.

    Args:
        embed: a pure function of one chunk; matrix products run at the highest precision. Pass the
            same object again and its program is compiled once.
        params: what `embed` takes first, the same in every process.
        load: the images of ascending indices, called by several threads, and in each process only
            for the images that its own devices compute. Past the end the last image is asked for
            again, to fill the last chunk.
        num_images: at least 2, for fewer have no distribution.
        mesh: chunks go round all of its devices.
        num_threads: that load, in this process.

    Raises:
        ValueError: if there are fewer than 2 images, or `load` returns another number than asked.
        FloatingPointError: naming the images whose features are not finite.
    """
    if num_images < 2:
        raise UserError(f"{num_images} images have no distribution to compare: give 2 or more")
    return _stream(embed, params, load, num_images, mesh, num_threads)


def extract(
    embed: Embed, params: Params, load: Load, num_images: int, mesh: Mesh, *, num_threads: int = 4
) -> Float[np.ndarray, "n d"]:
    """All features of `stream`, in memory."""
    parts = stream(embed, params, load, num_images, mesh, num_threads=num_threads)
    return np.concatenate(list(parts))


def cached(
    directory: pathlib.Path,
    weights: str,
    protocol: dict[str, Any],
    images: str,
    compute: Callable[[], Float[np.ndarray, "n d"]],
) -> Float[np.ndarray, "n d"]:
    """Features read back from `directory` if they are there, else computed and kept.

    Every process calls it.

    Args:
        directory: where features are kept.
        weights: hash of the weights of the network.
        protocol: JSON values that say how an image becomes a feature.
        images: hash of the set of images.
        compute: all of the features, as by `extract`.
    """
    key = cache.fingerprint(weights, protocol, images, CHUNK)
    return cache.cached(directory, "features", key, lambda: {"features": compute()})["features"]


def _stream(
    embed: Embed, params: Params, load: Load, num_images: int, mesh: Mesh, num_threads: int
) -> Iterator[Float[np.ndarray, "b d"]]:
    compiled, batch = program(embed, mesh), CHUNK * mesh.size
    params = sharding.place(params, sharding.replicated(mesh))
    placed = sharding.batch_sharding(mesh)
    devices = placed.addressable_devices_indices_map((batch,))
    starts = {device: rows[0].indices(batch)[0] for device, rows in devices.items() if rows}
    firsts = iter(range(0, num_images, batch))
    hidden = jax.process_index() > 0 or not sys.stderr.isatty()
    with (
        ThreadPoolExecutor(num_threads) as pool,
        tqdm(total=num_images, desc="features", unit="image", disable=hidden) as bar,
    ):

        def submit(first: int) -> dict[jax.Device, Future]:
            return {
                device: pool.submit(_load_chunk, load, first + start, num_images)
                for device, start in starts.items()
            }

        def fetch(first: int, features: Float[Array, "batch d"]) -> Float[np.ndarray, "b d"]:
            got = sharding.to_host(features)[: num_images - first]
            _check_finite(got, first)
            bar.update(len(got))
            return got

        loading = collections.deque(
            (first, submit(first)) for first in itertools.islice(firsts, _NUM_AHEAD)
        )
        running = None
        while loading:
            first, chunks = loading.popleft()
            images = _place(chunks, placed, batch)
            if (following := next(firsts, None)) is not None:
                loading.append((following, submit(following)))
            computed = compiled(params, images)  # returns at once
            if running is not None:
                yield fetch(*running)
            running = first, computed
        if running is not None:
            yield fetch(*running)


@functools.lru_cache(maxsize=8)
def program(embed: Embed, mesh: Mesh) -> Callable[[Params, Array], Array]:
    """One chunk on every device. Nothing moves between devices, so one device's program is all."""

    def of_chunk(params: Params, images: Num[Array, "b ..."]) -> Float[Array, "b d"]:
        with jax.default_matmul_precision("highest"):
            return embed(params, images).astype(jnp.float32)

    rows = sharding.batch_sharding(mesh).spec
    whole = sharding.replicated(mesh).spec
    mapped = jax.shard_map(
        of_chunk, mesh=mesh, in_specs=(whole, rows), out_specs=rows, check_vma=False
    )
    return jax.jit(mapped)


def _load_chunk(load: Load, first: int, num_images: int) -> Num[np.ndarray, "b ..."]:
    rows = np.minimum(np.arange(first, first + CHUNK), num_images - 1)
    asked = np.unique(rows)
    images = load(asked)
    if len(images) != len(asked):
        raise UserError(
            f"asked to load {len(asked)} images from number {asked[0]} on, got {len(images)}"
        )
    return images[rows - asked[0]]


def _place(chunks: dict[jax.Device, Future], placed: NamedSharding, batch: int) -> Array:
    parts = [jax.device_put(chunk.result(), device) for device, chunk in chunks.items()]
    shape = (batch, *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, placed, parts)


def _check_finite(features: Float[np.ndarray, "b d"], first: int) -> None:
    bad = first + np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise NotFiniteError(
            f"features of images {', '.join(map(str, bad[:10]))}{more} are not finite: look at"
            " these images, and at the weights of the network"
        )
