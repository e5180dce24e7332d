"""What users call beside a run: `sdprune NAME`, or `python -m sdprune_jax.commands NAME`."""

import importlib
import os
import sys
from collections.abc import Sequence

from sdprune_jax import UserError

COMMANDS = {  # name on the command line -> module of this folder, and what it does
    "convert": ("convert", "between diffusers, single files, old Flax and APTP's checkpoints"),
    "pack": ("pack", "a pruned model into a smaller file, and back bit for bit"),
    "prepare-data": ("prepare_data", "COCO and CC3M from their official files"),
    "compare": ("compare", "evaluated runs in one table"),
    "torch": ("torch_model", "an expert or a sliced model in PyTorch"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names, with the words after it."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name not in COMMANDS:
        print("usage: sdprune NAME ..., of which `sdprune NAME --help` says more\n")
        print("\n".join(f"  {name:14}{does}" for name, (_, does) in COMMANDS.items()))
        sys.exit(0 if name in ("-h", "--help") else 2)
    if name == "convert":  # nothing is computed: leave accelerators to others
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        importlib.import_module(f"sdprune_jax.commands.{COMMANDS[name][0]}").main(rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "diffusers"):
            raise
        needs = f"sdprune {name} needs {error.name}: pip install {error.name}"
        print(f"error: {needs}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
