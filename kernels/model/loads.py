"""Recorded loads of experts, as files have them: JSON, such as {"3": [812, 40]}, a number for each expert by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

EXAMPLE = '{"3": [812, 40]}'


def loads_of(source: object, text: str) -> Mapping[int, Sequence[float]]:
    """By layer, a number for every expert of the model. Raises `ValueError`, which names the `source`."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not (isinstance(fields, dict) and fields and all(key.isdecimal() for key in fields)):
        raise ValueError(f"{source} must hold a JSON object from layers to lists, such as {EXAMPLE}")
    numeric = all(
        isinstance(row, list) and row and all(type(pairs) in (int, float) for pairs in row) for row in fields.values()
    )
    loads = {int(layer): row for layer, row in fields.items()}
    if not numeric or len({len(row) for row in fields.values()}) != 1 or len(loads) < len(fields):
        raise ValueError(f"{source} must hold one list of numbers for each layer, all with one number for every expert")
    return loads
