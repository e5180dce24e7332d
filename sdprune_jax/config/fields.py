"""Fields of sections, with their legal values."""

import dataclasses
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def of(default: Any, *legal: Any) -> Any:
    """A field with a default and a closed set of legal values."""
    return dataclasses.field(default=default, metadata={"legal": legal})


def within(default: Any, low: int | float, high: int | float) -> Any:
    """A field with a default and a range, both ends included, for it or for each of a tuple."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})
