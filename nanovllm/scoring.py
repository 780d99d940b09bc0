"""How likely is each of some options after a prefix? The requests behind `LLM.score`.

Owns which tokens are scored: an option's, and none of the prefix, which then comes from the prefix cache for every
option but the first. Invariant: what an option scores does not depend on the other options.
"""

import math
from collections.abc import Sequence

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
    session: Session, input_processor: InputProcessor, prefix: Prompt, options: Sequence[str | Sequence[int]]
) -> list[float]:
    """See `LLM.score`."""
    session.check_open()
    check_options(options)
    prefix_ids = input_processor.read_prompt(prefix, "prefix")
    if len(options) * len(prefix_ids) > MAX_TOKENS:
        raise ValueError(
            f"{len(options)} options after a prefix of {len(prefix_ids)} tokens are more than {MAX_TOKENS} tokens, as "
            "each is a request: score fewer of them in a call"
        )
    inbox: Inbox[Sequence[Request]] = Inbox(lambda group: group)
    handles = []
    with session.numbers(len(options)) as numbers:
        for index, (option, number) in enumerate(zip(options, numbers, strict=True)):
            name = f"options[{index}]"
            token_ids = prefix_ids + input_processor.read_continuation(option, name)
            group = input_processor.process(token_ids, SCORE_PARAMS, name, number)
            scoring_of(group[0]).skip(len(prefix_ids) - 1)
            handles.append(Handle(group, inbox, only_ends=True))
    for _ in session.run(handles, inbox):
        pass
    return [log_likelihood(handle.requests[0]) for handle in handles]


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
