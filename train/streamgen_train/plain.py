"""Plain data with tensors in it, as JSON and a flat table of tensors; and back, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of dicts (str and int keys), lists, tuples, numbers, strings, booleans and None; a tensor is put into
    `tensors` under its place in the data. TypeError names the place of anything else.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        if not all(type(key) in (str, int) for key in value):
            raise TypeError(f"{name}: keys must be strings or integers, got {list(value)[:5]}")
        return {"dict": [[key, encode(item, f"{name}/{key!r}", tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [encode(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} is neither plain data nor a tensor")


def decode(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given."""
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in content}
    items = [decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def tensor_names(data: Any) -> list[str]:
    """Tensors that a piece of encoded data needs."""
    if not isinstance(data, dict):
        return []
    ((kind, content),) = data.items()
    if kind == "tensor":
        return [content]
    return [name for item in content for name in tensor_names(item[1] if kind == "dict" else item)]
