"""How likely is each of some options after a prefix? The requests behind `LLM.score`.

Owns which tokens are scored: an option's, and none of the prefix, which then comes from the prefix cache for every
option but the first. Invariant: what an option scores does not depend on the other options.
"""

import math
from collections.abc import Callable, Sequence

from nanovllm.engine.features.scoring import Scoring
from nanovllm.engine.input_processor import InputProcessor, Prompt
from nanovllm.engine.logprobs import own_logprob
from nanovllm.engine.request import Request
from nanovllm.engine.session import Handle, Inbox, Session
from nanovllm.errors import brief
from nanovllm.sampling_params import SamplingParams

MAX_TOKENS = 2**26  # of all prompts of a call; half a gigabyte
# The one token that each request also draws is looked at by nobody.
SCORE_PARAMS = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)


def score(
    session: Session,
    input_processor: InputProcessor,
    prefix: Prompt,
    options: Sequence[str | Sequence[int]],
    times: int = 1,
    give: Callable[[Sequence[Sequence[Request]]], object] = lambda groups: None,
) -> list[list[float]]:
    """See `LLM.score`. times: how often, all in one batch. give: is shown the requests, in order, before they run."""
    session.check_open()
    check_options(options)
    prefix_ids = input_processor.read_prompt(prefix, "prefix")
    num_options = len(options)
    if times * num_options * len(prefix_ids) > MAX_TOKENS:
        raise ValueError(
            f"{times * num_options} options after a prefix of {len(prefix_ids)} tokens are more than {MAX_TOKENS} "
            "tokens, as each is a request: score fewer of them in a call"
        )
    inbox: Inbox[Sequence[Request]] = Inbox(lambda group: group)
    groups = []
    with session.numbers(times * num_options) as numbers:
        for number, (index, option) in zip(numbers, times * list(enumerate(options)), strict=True):
            name = f"options[{index}]"
            token_ids = prefix_ids + read_continuation(input_processor, option, name)
            groups.append(input_processor.process(token_ids, SCORE_PARAMS, name, number))
            scoring_of(groups[-1][0]).skip(len(prefix_ids) - 1)
    give(groups)
    handles = [Handle(group, inbox, only_ends=True) for group in groups]
    for _ in session.run(handles, inbox):
        pass
    scores = [log_likelihood(handle.requests[0]) for handle in handles]
    return [scores[i * num_options : (i + 1) * num_options] for i in range(times)]


def read_continuation(input_processor: InputProcessor, text: str | Sequence[int], name: str) -> list[int]:
    """Token ids of what follows a prompt: without the special tokens that stand at a beginning."""
    token_ids = input_processor.text.read(text, name, add_special_tokens=False) if isinstance(text, str) else text
    return input_processor.check_token_ids(token_ids, name)


def scoring_of(request: Request) -> Scoring:
    """For a request with SCORE_PARAMS."""
    assert request.scoring is not None
    return request.scoring


def log_likelihood(request: Request) -> float:
    """Sum of the log-probabilities of the tokens that were scored."""
    return math.fsum(map(own_logprob, scoring_of(request).logprobs))


def check_options(options: Sequence[str | Sequence[int]]) -> None:
    """Raise TypeError or ValueError for what is no list of texts or token ids, none of them empty."""
    if isinstance(options, (str, bytes, bytearray, memoryview)) or not isinstance(options, Sequence):
        raise TypeError(f"options must be a list of strings or of token ids, got {brief(options)}")
    for index, option in enumerate(options):
        if not isinstance(option, str) and not hasattr(option, "__iter__"):
            raise TypeError(f"options[{index}] must be a string or a list of token ids, got {brief(option)}")
        if not len(option):
            raise ValueError(f"options[{index}] is empty; give at least one token")
