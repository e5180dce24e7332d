"""The order in which a training sees its rows."""

import numpy as np
from jaxtyping import Int

_RUN = 24  # rows of one group that follow each other


def rows_of_batch(
    num_rows: int,
    batch_size: int,
    step: int,
    seed: int,
    groups: Int[np.ndarray, " rows"] | None = None,
) -> Int[np.ndarray, " batch"]:
    """The rows of batch `step`: every row once an epoch, reshuffled each epoch.

    A function of the step alone, so that a resumed run sees what an uninterrupted one sees.

    Args:
        num_rows: number of rows in the data.
        batch_size: rows.
        step: from 0.
        seed: draws the order.
        groups: the group of each row; rows of one group then come in runs of 24.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(positions // num_rows):
        here = positions // num_rows == epoch
        rng = np.random.default_rng([seed, int(epoch)])
        order = rng.permutation(num_rows)
        if groups is not None:
            order = order[np.argsort(groups[order], kind="stable")]
            runs = np.array_split(order, -(-num_rows // _RUN))
            order = np.concatenate([runs[i] for i in rng.permutation(len(runs))])
        rows[here] = order[positions[here] % num_rows]
    return rows
