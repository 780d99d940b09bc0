"""What error messages share: a misspelt name is refused with the nearest right one, and what callers brought is cut."""

from collections.abc import Iterable
from difflib import get_close_matches


class RequestError(RuntimeError):
    """A request could not go on, for a reason of its own: a Python logits processor of it failed, for example."""


class EngineDeadError(RuntimeError):
    """A process that the engine needs has ended, or does not answer: nothing can be run any more."""


class NotReadyError(RuntimeError):
    """The engine has no weights to generate with now: it sleeps, or they have not been given again."""


def reject_unknown_options(owner: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for the first of `options` that is not in `known`, naming the nearest known one."""
    names = list(known)
    for option in options:
        if option not in names:
            # A beginning of a name, or nearly all of its letters: with fewer in common it is another thing.
            begun = [name for name in names if name.startswith(option)]
            nearest = begun or get_close_matches(option, names, n=1, cutoff=0.7)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"options are: {', '.join(names)}"
            raise TypeError(f"{owner} has no option {option!r}: {hint}")


def cut(text: str, limit: int = 300) -> str:
    """The text, or its beginning and its end, so that no message is longer for what a caller brought."""
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]} ... {text[-limit // 3 :]} ({len(text):,} characters)"


def brief(value: object) -> str:
    """A value as messages show it: its repr, cut."""
    return cut(repr(value), 120)
