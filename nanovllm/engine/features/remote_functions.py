"""Python functions for models that run in other processes, where they are found by their names."""

import pickle
from collections.abc import Iterable
from typing import Any


def check_importable(functions: Iterable[Any], name: str) -> None:
    """Raises ValueError for a function that another process could not find by its name."""
    for function in functions:
        try:
            pickle.dumps(function)
            is_importable = getattr(function, "__module__", None) != "__main__"
        except (pickle.PicklingError, AttributeError, TypeError):
            is_importable = False
        if not is_importable:
            raise ValueError(
                f"{name} holds {function!r}, but the model runs in other processes: define it in a module that can be "
                "imported there"
            )
