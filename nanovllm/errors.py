"""One check that every options object shares: a misspelt name is refused, with the nearest right one."""

from collections.abc import Iterable
from difflib import get_close_matches


def reject_unknown_options(owner: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for the first of `options` that is not in `known`, naming the nearest known one."""
    names = list(known)
    for option in options:
        if option not in names:
            nearest = get_close_matches(option, names, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"options are: {', '.join(names)}"
            raise TypeError(f"{owner} has no option {option!r}: {hint}")
