"""Which adapters have a slot: few slots, requests that wait for one, and who gives one up."""

from nanovllm.engine.features.adapters import AdapterRef, AdapterSlots
from nanovllm.engine.request import Request
from nanovllm.sampling_params import SamplingParams


def make_request(name: str | None) -> Request:
    request = Request(
        request_id="1", prompt=None, token_ids=[1], num_prompt_tokens=1, params=SamplingParams(), seed=0,
        stop_token_ids=frozenset(), max_total_tokens=5, cache_salt=b"salt",
    )  # fmt: skip
    if name is not None:
        AdapterRef(name.encode()).give_to([request])
    return request


def place(request: Request) -> tuple[int, bytes]:
    assert request.adapter is not None
    return request.adapter.place


def test_slots_are_shared_kept_and_taken_over_by_who_was_idle_longest() -> None:
    slots = AdapterSlots(2)
    a, b, c, plain = make_request("a"), make_request("b"), make_request("c"), make_request(None)
    assert slots.admits(a, []) and slots.admits(b, [a]) and slots.admits(plain, [a, b])
    assert {place(a)[0], place(b)[0]} == {0, 1} and place(a)[1] == b"a"
    assert not slots.admits(c, [a, b, plain]), "both are read by somebody"
    again = make_request("a")
    assert slots.admits(again, [b]) and place(again) == place(a), "it is still there"
    assert slots.admits(c, [again]) and place(c)[0] == place(b)[0]
    assert not slots.admits(make_request("b"), [again, c])
    assert slots.admits(b, [c]) and place(b)[0] == place(a)[0]


def test_an_adapter_is_in_the_salt_of_its_blocks() -> None:
    assert make_request("a").cache_salt == b"salta" != make_request(None).cache_salt
