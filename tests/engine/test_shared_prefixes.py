"""Which decodes share a prefix: found from block tables alone."""

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.scheduler_output import SharedPrefix
from nanovllm.engine.shared_prefixes import find_shared_prefixes
from tests.engine.fake_device import make_engine, make_request, run, steps


def tables(*shape: tuple[int, list[int]]) -> list[list[int]]:
    """For each (shared blocks, own blocks of each request): requests that share, none of them with another run."""
    new = count()
    found = []
    for num_shared, own in shape:
        shared = [next(new) for _ in range(num_shared)]
        found += [shared + [next(new) for _ in range(n)] for n in own]
    return found


def test_siblings() -> None:
    got = find_shared_prefixes(tables((16, [1] * 16), (0, [9]), (20, [3, 1, 2])), 1, 64, 1)
    assert got == [SharedPrefix(0, 16, 0, 1024), SharedPrefix(17, 3, 0, 1280)]


def test_documents_behind_a_system_prompt() -> None:
    """Also one that a single request asks about: it shares the system prompt."""
    system = list(range(1000, 1016))
    found = find_shared_prefixes([system + table for table in tables((32, [1] * 3), (32, [1] * 2), (0, [7]))], 1, 64, 1)
    assert found == [SharedPrefix(0, 6, 0, 1024), SharedPrefix(0, 3, 1024, 3072), SharedPrefix(3, 2, 1024, 3072)]


def test_ends_at_a_multiple_of_the_unit() -> None:
    """Of small blocks, several make a tile."""
    assert find_shared_prefixes(tables((130, [1] * 4)), 4, 16, 1) == [SharedPrefix(0, 4, 0, 2048)]


def test_little_to_save_is_left() -> None:
    assert find_shared_prefixes(tables((15, [1, 1])), 1, 64, 1024) == []
    assert find_shared_prefixes(tables((16, [1, 1])), 1, 64, 1024) == [SharedPrefix(0, 2, 0, 1024)]
    assert find_shared_prefixes(tables((8, [1, 1, 1])), 1, 64, 1024) == [SharedPrefix(0, 3, 0, 512)]
    assert find_shared_prefixes(tables((0, [500, 500])), 1, 64, 1) == find_shared_prefixes([], 1, 64, 1) == []


@given(st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=30), st.integers(1, 3))
def test_what_is_found_is_shared(paths: list[list[int]], unit: int) -> None:
    """Any trees, with blocks told apart by the way to them: what is found is in every table at its place."""
    ids: dict[tuple[int, ...], int] = {}
    found = [[ids.setdefault(tuple(path[:i]), len(ids)) for i in range(1, len(path) + 1)] for path in sorted(paths)]
    prefixes = find_shared_prefixes(found, unit, 4096, 1)
    depth = [0] * len(found)
    for first, number, begin, end in prefixes:
        size = 4096
        assert number > 1 and begin < end and begin % (unit * size) == end % (unit * size) == 0
        rows = found[first : first + number]
        assert len(rows) == number and len({tuple(row[: end // size]) for row in rows}) == 1
        assert len(rows[0]) >= end // size
        assert depth[first : first + number] == [begin] * number, "they follow each other from token 0 on"
        depth[first : first + number] = [end] * number


def test_a_plan_says_what_its_decodes_share_until_they_part() -> None:
    """Siblings and a stranger between prompts; then in steady steps; then when one of two has ended."""
    engine, device = make_engine(num_blocks=100, block_size=4)
    a, b = make_request(range(17), 20, name="a"), make_request([*range(16), 90], 8, name="b")
    c = make_request(range(40, 57), 20, name="c")
    for request in (a, b, c):
        engine.add_request(request)
        engine.step()
    for _ in steps(engine):
        if b.is_finished:
            break
    together = [plan for plan in device.plans if plan.num_decodes == 3]
    assert together and all(plan.shared_prefixes == [SharedPrefix(0, 2, 0, 16)] for plan in together)
    first_after = len(device.plans)
    run(engine)
    assert device.plans[first_after:] and not any(plan.shared_prefixes for plan in device.plans[first_after:])


def test_a_part_of_a_step_shares_what_its_decodes_do() -> None:
    engine, device = make_engine(num_blocks=100, block_size=4)
    for i in range(5):
        engine.add_request(make_request([*range(16), 80 + i], 8, name=str(i)))
        engine.step()
    run(engine)
    plan = next(plan for plan in device.plans if plan.num_decodes == 5)
    assert plan.select([0, 2, 3]).shared_prefixes == [SharedPrefix(0, 3, 0, 16)]
    assert plan.select([4]).shared_prefixes == []
