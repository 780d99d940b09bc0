"""The turns that threads of one process take in Python's interpreter."""

import gc
import sys

_SWITCH_SECONDS = 0.0002


def share_interpreter() -> None:
    """For a process whose threads hand each other something at every step; called once all is imported and loaded.

    A thread that wants the interpreter waits 5 ms for one that does not give it up by itself, which is a step or two:
    now less. And a collection that looks at all that imports have made takes a tenth of a second: that is left out.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
