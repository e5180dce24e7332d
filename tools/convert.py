"""Converts Stable Diffusion 2 between forms, without installing the package: `sdprune convert`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from sdprune_jax.commands import __main__ as commands

if __name__ == "__main__":
    commands.main(["convert", *sys.argv[1:]])
