"""The rows of a sweep's table, sorted for drawings and tables, and the words for them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

DISTANCE = "latent_mse_to_dense"
BOTH = "both"  # components at once
_WORDS = {
    "text_encoder": "text encoder",
    "unet": "UNet",
    DISTANCE: "distance to dense's latents",
    "fd_clip_embedded": "FD of the embedded CLIP's features",
    "fid": "FID",
}
_SCOPES = {
    "linear": "linear layers",
    "linear+conv": "linear layers and convolutions",
    "obsdiff": "attention and feed-forward",
    "all": "all layers",
}

Row = Mapping[str, Any]
Rows = Sequence[Row]


class Group(NamedTuple):
    """Rows that one drawing holds.

    Attributes:
        component: or `BOTH`.
        title: names the component and, where there are several, the layers in scope.
        methods: rows of every sparsity and seed, by method.
    """

    component: str
    title: str
    methods: Mapping[str, Rows]


def groups(sweep: Mapping[str, Any]) -> list[Group]:
    """Rows by component and scope, then by method, in the order of the table."""
    by_scope: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in sweep["rows"]:
        parts = row["components"]
        component, scope = BOTH, ""
        if len(parts) == 1:
            ((component, part),) = parts.items()
            scope = part.get("scope", "linear")
        method = " and ".join(dict.fromkeys(part["method"] for part in parts.values()))
        by_scope.setdefault((component, scope), {}).setdefault(method, []).append(row)
    scopes = [component for component, _ in by_scope]
    return [
        Group(
            component,
            word(component)
            + (f", {_SCOPES.get(scope, scope)}" if scopes.count(component) > 1 else ""),
            methods,
        )
        for (component, scope), methods in by_scope.items()
    ]


def means(rows: Rows, component: str, figure: str) -> Iterator[tuple[float, list[float]]]:
    """Each sparsity, and the figure of every seed."""
    by_sparsity: dict[float, list[float]] = {}
    for row in rows:
        if figure in row["figures"]:
            value = row["figures"][figure]["value"]
            by_sparsity.setdefault(at(row, component), []).append(value)
    yield from sorted(by_sparsity.items())


def at(row: Row, component: str) -> float:
    return row["nominal"] if component == BOTH else row["components"][component]["sparsity"]


def point(row: Row) -> tuple[Any, ...]:
    """What the rows of one point have in common, whatever their seed."""
    return tuple(
        (name, part["method"], part["sparsity"]) for name, part in row["components"].items()
    )


def spread(rows: Rows, figure: str) -> str:
    """The mean over seeds, and the range if there are several; what failed is counted."""
    values = [row["figures"][figure]["value"] for row in rows if figure in row["figures"]]
    failed = sum("failed" in row for row in rows)
    cell = f"{np.mean(values):.4g}" if values else ""
    if len(values) > 1:
        cell += f" ({min(values):.4g} to {max(values):.4g})"
    return cell + (f" {failed} of {len(rows)} failed" if failed else "")


def figures(sweep: Mapping[str, Any]) -> list[str]:
    """Those that are drawn."""
    distances = [name for name in names(sweep) if name.startswith(("fd_", "fid"))]
    return [sweep["agreement"], DISTANCE, *distances]


def marks(sweep: Mapping[str, Any], component: str, figure: str) -> dict[str, float]:
    """The cliff of each method that has one."""
    return {
        cliff["method"]: cliff["broken"]
        for cliff in sweep["cliffs"]
        if (cliff["component"], cliff["criterion"]) == (component, figure) and "broken" in cliff
    }


def levels(sweep: Mapping[str, Any], figure: str) -> dict[str, float]:
    """What the dense model and chance get, on average over seeds."""
    chance = [row["chance"][figure] for row in sweep["dense"] if figure in row["chance"]]
    dense = [row["figures"][figure]["value"] for row in sweep["dense"] if figure in row["figures"]]
    dense = dense or ([0.0] if figure == DISTANCE else [])
    values_of = {"dense": dense, "chance": chance}
    return {name: float(np.mean(values)) for name, values in values_of.items() if values}


def names(sweep: Mapping[str, Any]) -> list[str]:
    """The names of all figures that any row has, in order of appearance."""
    return list(dict.fromkeys(name for row in sweep["rows"] for name in row["figures"]))


def label(name: str, sweep: Mapping[str, Any]) -> str:
    return "agreement with the prompt" if name == sweep["agreement"] else word(name)


def word(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))
