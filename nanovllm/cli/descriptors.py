"""How many connections a process may have: each is a descriptor."""

from contextlib import suppress


def allow_many_descriptors() -> None:
    """As many as the system lets this user have: the 1,024 that many systems begin with are for programs of old."""
    with suppress(ImportError, OSError, ValueError):  # there are no such limits, or they stay as they are
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
