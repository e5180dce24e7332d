"""What users call beside a run: `sdprune NAME`, or `python -m sdprune_jax.commands NAME`."""

import importlib
import os
import sys

COMMANDS = {  # name on the command line -> module of this folder
    "convert": "convert",
    "pack": "pack",
    "prepare-data": "prepare_data",
    "compare": "compare",
    "torch": "torch_model",
}


def main() -> None:
    """Runs the command that the first word names, with the words after it."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        print(f"usage: sdprune {{{','.join(COMMANDS)}}} ...")
        sys.exit(0 if name in ("-h", "--help") else 2)
    if name == "convert":  # nothing is computed: leave accelerators to others
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.argv = [f"sdprune {name}", *rest]
    importlib.import_module(f"sdprune_jax.commands.{COMMANDS[name]}").main()


if __name__ == "__main__":
    main()
