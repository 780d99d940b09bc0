"""Stop strings in a text that grows token by token.

Owns where one begins, and which ending of a text may become one. Invariant: no call looks at more of the text than a
stop string, or the newest token's text, is long. join: the text between two characters; longest: of the stop strings.
"""

from collections.abc import Callable, Sequence

Join = Callable[[int, int], str]


def find_stop(
    stops: Sequence[str], longest: int, join: Join, before_newest: int, length: int
) -> tuple[int, str] | None:
    """Where the first stop string begins that is not whole without the newest token's text; and which it is.

    before_newest, length: of the text without the newest token's, and with it.
    """
    first = max(0, before_newest - longest + 1)
    text = join(first, length)
    found: tuple[int, str] | None = None
    for stop in stops:
        at = text.find(stop, max(0, before_newest - len(stop) + 1 - first))
        if at >= 0 and (found is None or at < found[0]):
            found = at, stop
    return None if found is None else (first + found[0], found[1])


def length_of_possible_stop(stops: Sequence[str], longest: int, join: Join, length: int) -> int:
    """Of the longest ending of the text that is the beginning of a stop string."""
    text = join(max(0, length - longest + 1), length)
    found = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), found, -1):
            if text.endswith(stop[:size]):
                found = size
                break
    return found
