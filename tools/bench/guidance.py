"""FD of the embedded CLIP's features at guidances other than that of the protocol `embedded`.

    python tools/bench/guidance.py 2 3 4 [--model DIR] [--num_images 2000]

A protocol's guidance is part of its figure, so these are of no protocol: they say at which guidance
a model draws best. `--model` is a diffusers directory; the first version of the embedded model is
`sdprune_jax/embedded` at commit cd2791d. Two to four minutes a guidance on 2 cores.
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax

from sdprune_jax import config, main, sharding
from sdprune_jax.evaluate import protocols
from sdprune_jax.files import json_files


def measure(model: str, guidance_scale: float, num_images: int) -> dict[str, float]:
    """The FD, and its interval of 95 %."""
    protocol = protocols.PROTOCOLS["embedded"]
    protocols.PROTOCOLS["embedded"] = dataclasses.replace(protocol, guidance_scale=guidance_scale)
    section = config.Evaluate(batch_size=16, num_images=num_images, num_resamples=100)
    with tempfile.TemporaryDirectory() as directory:
        run = config.Run(workdir=directory, model=model, evaluate=section)
        (record,) = main.run_stages(run)
        figures = json_files.read_json(record)["models"]["dense"]["figures"]
    return figures["fd_clip_embedded"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("guidance", type=float, nargs="+")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--num_images", type=int, default=2000)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    sharding.keep_freed_memory()
    for guidance in args.guidance:
        figure = measure(args.model, guidance, args.num_images)
        print(
            f"guidance {guidance:g}: FD {figure['value']:.4f} [{figure['low']:.4f},"
            f" {figure['high']:.4f}], {args.num_images} images"
        )
