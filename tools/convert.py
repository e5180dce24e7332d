"""Converts Stable Diffusion 2 between forms, without installing the package: `sdprune convert`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from sdprune_jax.commands import convert

if __name__ == "__main__":
    convert.main()
