"""Distances between sets of features by kernels: KID and CMMD."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sdprune_jax import UserError, sharding

_TILE = 512  # rows and columns of the largest kernel matrix on a device


def kid(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "m _d"],
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """The kernel Inception distance: mean and standard deviation over random subsets.

    The unbiased squared MMD under the kernel `(x . y / d + 1)^3`, which may be negative. Rows are
    put in an order of their own first, so subsets do not depend on the order of the images.

    Args:
        x: features of one set.
        y: features of the other set.
        num_subsets: drawn from each set, without replacement.
        subset_size: images, or the smaller set if that has fewer.
        seed: draws the subsets.

    Raises:
        ValueError: as `_check`, or if a subset would have fewer than 2 images, or there is none.

    Source: Binkowski et al. 2018 (https://arxiv.org/abs/1801.01401), section 4;
        the numbers of clean-fid, and the draws of torch-fidelity.
    """
    _check(x, y)
    if num_subsets < 1 or subset_size < 2:
        raise UserError(
            f"KID needs a subset of 2 images, got num_subsets={num_subsets} and"
            f" subset_size={subset_size}"
        )
    x, y = _in_own_order(x), _in_own_order(y)
    size = min(len(x), len(y), subset_size)
    rng = np.random.RandomState(seed)  # not default_rng: numpy never changes what this one draws
    found = np.empty(num_subsets)
    for i in range(num_subsets):
        a = x[rng.choice(len(x), size, replace=False)]
        b = y[rng.choice(len(y), size, replace=False)]
        found[i] = (_off_diagonal(a) + _off_diagonal(b)) / (size * (size - 1))
        found[i] -= 2 * _cubes(a, b).sum() / size**2
    return float(found.mean()), float(found.std())


def cmmd(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "m _d"],
    mesh: Mesh,
    *,
    sigma: float = 10.0,
    scale: float = 1000.0,
) -> float:
    """The biased squared MMD of unit vectors under `exp(-|x - y|^2 / (2 sigma^2))`, times `scale`.

    With `w` the weights 1/n of `x` and -1/m of `y`, it is the sum over all pairs of `w w k`. The
    kernel hardly differs from 1, so the three means of the definition cancel to a few digits. But
    `w` sums to 0, so whatever depends on one of a pair can be taken from `k`. About the mean of all
    vectors, with `s = x . y / sigma^2` and `a = exp(-|x|^2 / (2 sigma^2))`, that leaves
    `a a (exp(s) - 1) + (a - 1)(a - 1)`. All of it but `a a (exp(s) - 1 - s)`, the smallest part, is
    a sum over single vectors, which the host takes in float64; the devices take the pairs, tile by
    tile, in float32.

    Args:
        x: unit vectors of one set.
        y: features of the other set.
        mesh: over which the rows are split.
        sigma: width of the kernel.
        scale: factor of the result.

    Raises:
        ValueError: as `_check`, or if `sigma` is not positive or far below the vectors' distances.

    Source: Jayasumana et al. 2024 (https://arxiv.org/abs/2401.09603), section 4.
    """
    _check(x, y)
    if not sigma > 0:
        raise UserError(f"sigma is the width of the kernel, above 0, got {sigma}")
    z = np.concatenate([x, y]).astype(np.float64)
    weight = np.repeat([1 / len(x), -1 / len(y)], [len(x), len(y)])
    z = (z - z.mean(axis=0)[None]) / sigma
    squares = np.sum(z**2, axis=1)
    if squares.max() > 60:  # exp(s) would leave the range of float32
        raise UserError(
            f"sigma={sigma} is too narrow for vectors {squares.max() ** 0.5:.3g} sigma off"
        )
    loss = np.expm1(-0.5 * squares)  # a - 1
    weight_a = weight * (1 + loss)
    linear = weight_a @ z
    pairs = weight_a @ _against_all(z, weight_a, mesh)
    return float(scale * (linear @ linear + (weight @ loss) ** 2 + pairs))


def _check(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m _d"]) -> None:
    """Raises ValueError unless both are finite features of one network, of 2 images or more."""
    problems = [
        f"{name} has {len(part)} images, expected 2 or more"
        for name, part in (("x", x), ("y", y))
        if len(part) < 2
    ]
    problems += [
        f"{name} is not finite"
        for name, part in (("x", x), ("y", y))
        if not np.isfinite(part).all()
    ]
    if x.shape[1] != y.shape[1]:
        problems.append(f"x has {x.shape[1]} features and y {y.shape[1]}: they are of two networks")
    if problems:
        raise UserError("cannot compare these features: " + "; ".join(problems))


def _in_own_order(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows sorted by their sums, ties by the first features; all of them take 30 s to sort."""
    x = x.astype(np.float64)
    return x[np.lexsort([*x[:, :8].T[::-1], x.sum(axis=1)])]


def _cubes(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    k = a @ b.T
    k /= a.shape[1]
    k += 1
    return k * k * k  # not a power, which takes a logarithm of each


def _off_diagonal(a: Float[np.ndarray, "n d"]) -> float:
    k = _cubes(a, a)
    return k.sum() - np.trace(k)


def _against_all(
    z: Float[np.ndarray, "n d"], weight: Float[np.ndarray, " n"], mesh: Mesh
) -> Float[np.ndarray, " n"]:
    """For every row, the weighted sum over all rows of `exp(s) - 1 - s`, `s` their product."""
    pad = -len(z) % (_TILE * mesh.size)
    rows = np.pad(z, ((0, pad), (0, 0))).astype(np.float32)
    columns = np.pad(weight, (0, pad)).astype(np.float32)  # padding weighs nothing
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    arguments = (
        jax.make_array_from_callback(array.shape, placed, lambda index, array=array: array[index])
        for array, placed in ((rows, split), (rows, whole), (columns, whole))
    )
    summed = sharding.to_host(_sum_tiles(mesh)(*arguments))
    return summed[: len(z)].astype(np.float64)


@functools.lru_cache(maxsize=8)
def _sum_tiles(mesh: Mesh) -> Callable[..., Array]:
    split, whole = sharding.batch_sharding(mesh).spec, sharding.replicated(mesh).spec

    def of_device(
        rows: Float[Array, "n d"], columns: Float[Array, "m d"], weight: Float[Array, " m"]
    ) -> Float[Array, " n"]:
        tiles = columns.reshape(-1, _TILE, columns.shape[1]), weight.reshape(-1, _TILE)

        def of_tile(part: Float[Array, "tile d"]) -> Float[Array, " tile"]:
            def one(_, tile):
                s = jnp.matmul(part, tile[0].T, precision="highest")
                return None, jnp.matmul(_exp_less_line(s), tile[1], precision="highest")

            return jax.lax.scan(one, None, tiles)[1].sum(axis=0)

        return jax.lax.map(of_tile, rows.reshape(-1, _TILE, rows.shape[1])).reshape(-1)

    mapped = jax.shard_map(
        of_device, mesh=mesh, in_specs=(split, whole, whole), out_specs=split, check_vma=False
    )
    return jax.jit(mapped)


def _exp_less_line(s: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """`exp(s) - 1 - s` to float32, also where `s` is small and the difference would cancel."""
    series = jnp.full_like(s, 1 / 40320)
    for k in (5040, 720, 120, 24, 6, 2):
        series = series * s + 1 / k
    return jnp.where(jnp.abs(s) < 0.5, s * s * series, jnp.expm1(s) - s)
