"""Settings of a measurement, beside its protocol."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Settings of a measurement.

    Attributes:
        protocol: name of one of `protocols.PROTOCOLS`.
        num_images: images of each model; 0 for as many as the protocol says.
        batch_size: images at once, over all devices.
        networks: directory that tools/convert_metric_weights.py wrote.
        data: directory that `sdprune prepare-data` wrote.
        references: a .npz with `mu` and `sigma` of the reference pictures' features; empty
            computes them from `data`.
        num_resamples: resamples of the bootstrap; 0 gives no intervals.
    """

    protocol: str = "embedded"
    num_images: int = 0
    batch_size: int = 16
    networks: str = ""
    data: str = ""
    references: str = ""
    num_resamples: int = 200
