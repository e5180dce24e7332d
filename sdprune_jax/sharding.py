"""The device mesh, the one sharding rule, and the start of a multi-host run."""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MIN_SHARDED_BYTES = 4 * 2**20  # smaller arrays are cheaper to replicate than to gather


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A `(data, fsdp)` mesh over all devices; -1 for `data` takes what `fsdp` leaves.

    Raises:
        ValueError: if the product of the axes is not the number of devices.
    """
    count = jax.device_count()
    legal = [n for n in range(1, count + 1) if count % n == 0]
    if fsdp not in legal:
        raise ValueError(f"mesh.fsdp={fsdp} does not divide {count} devices; use one of {legal}")
    if data not in (-1, count // fsdp):
        raise ValueError(
            f"mesh.data={data} times mesh.fsdp={fsdp} is not {count} devices;"
            f" use data={count // fsdp}, or -1 for all that are left"
        )
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((count // fsdp, fsdp), ("data", "fsdp"), axis_types=axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def to_host(x: Any) -> np.ndarray:
    """The whole of an array; every process calls it if parts are on other hosts."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def fsdp_shardings(tree: Any, mesh: Mesh, min_bytes: int = MIN_SHARDED_BYTES) -> Any:
    """A sharding for every leaf: its largest axis that divides over `fsdp`, if it is big.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`s.
        mesh: of `make_mesh`.
        min_bytes: smaller leaves are replicated.
    """

    def rule(x: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        if math.prod(x.shape) * x.dtype.itemsize >= min_bytes:
            for axis in sorted(range(len(x.shape)), key=lambda axis: -x.shape[axis]):
                if x.shape[axis] % mesh.shape["fsdp"] == 0:
                    return NamedSharding(mesh, P(*[None] * axis, "fsdp"))
        return replicated(mesh)

    return jax.tree.map(rule, tree)
