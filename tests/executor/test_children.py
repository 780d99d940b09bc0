"""Children that are started before they are needed."""

from nanovllm.executor.children import start_child, started_ahead


def test_a_child_that_was_started_ahead_is_taken_by_who_starts_one() -> None:
    with started_ahead("timeit", 2):  # a module that ends soon, as no parent of this kind speaks to it
        child = start_child("replica 0", "timeit")
        other = start_child("other", "this")
        first = start_child("replica 1", "timeit").process.pid
    assert {child.name, other.name} == {"replica 0", "other"} and first != child.process.pid
    for one in (child, other):
        one.process.wait()
        one.release()


def test_those_that_nobody_took_are_ended() -> None:
    with started_ahead("http.server", 1):
        pass
    with started_ahead("timeit", 1):
        child = start_child("replica 0", "timeit")
    again = start_child("replica 0", "timeit")  # behind it there are none
    assert again.process.pid != child.process.pid
    for one in (child, again):
        one.process.wait()
        one.release()
