"""Beam search on top of the engine's public interface: keep the most likely beginnings, extend each by one token.

Owns the bookkeeping of beams; every step is one `generate` of one token for each beam of all prompts, and the prefix
cache keeps what was computed. Invariant: of a prompt's beams and their likeliest continuations, none that was dropped
is more likely than one that was kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from nanovllm.engine.input_processor import InputProcessor, Prompt
from nanovllm.engine.logprobs import LogprobsMap
from nanovllm.options import accepting, check_fields, option, takes_options
from nanovllm.outputs import BeamSearchOutput, BeamSearchSequence, Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Tokenizer

Generate = Callable[[list[list[int]], SamplingParams], list[RequestOutput]]


@takes_options
@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Parameters of `LLM.beam_search`. Raises TypeError for a wrong type or name and ValueError out of range.

    beam_width: sequences that are kept at a time, and returned.
    max_tokens: at most this many output tokens.
    ignore_eos: go on past the model's end-of-sequence tokens.
    temperature: logits are divided by it; 0 and 1 leave them as they are.
    length_penalty: sequences are compared by their log-probability divided by this power of their length, prompt
        included; above 0 it favours long ones.
    """

    beam_width: int = field(metadata=accepting(low=1))
    max_tokens: int = field(metadata=accepting(low=1))
    ignore_eos: bool = False
    temperature: float = option(0.0, low=0, words="0 or more")
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)


def search_prompts(
    generate: Generate,
    input_processor: InputProcessor,
    tokenizer: Tokenizer | None,
    max_model_len: int,
    prompts: Sequence[Prompt],
    params: BeamSearchParams,
    use_tqdm: bool,
) -> list[BeamSearchOutput]:
    """See `LLM.beam_search`."""
    if not isinstance(params, BeamSearchParams):
        raise TypeError(f"params must be BeamSearchParams, got {params!r}")
    longest = max_model_len - params.max_tokens
    token_ids = [input_processor.read_prompt(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    for i, ids in enumerate(token_ids):
        if len(ids) > longest:
            raise ValueError(
                f"prompts[{i}] has {len(ids)} tokens; with max_tokens={params.max_tokens} and max_model_len="
                f"{max_model_len} there is room for {max(longest, 0)}"
            )
    with tqdm(total=params.max_tokens, desc="Beam search", unit=" tokens", disable=not use_tqdm) as progress:

        def generate_and_count(beams: list[list[int]], step: SamplingParams) -> list[RequestOutput]:
            progress.update()
            return generate(beams, step)

        outputs = beam_search(generate_and_count, token_ids, params, input_processor.eos_token_ids)
    for sequence in (sequence for output in outputs for sequence in output.sequences):
        if tokenizer is not None:
            sequence.text = tokenizer.decode(sequence.tokens[sequence.num_prompt_tokens :])
    return outputs


def beam_search(
    generate: Generate, prompts: Sequence[list[int]], params: BeamSearchParams, eos_token_ids: frozenset[int]
) -> list[BeamSearchOutput]:
    """For each prompt (token ids) the best `beam_width` sequences, best first.

    As vLLM's: a sequence ends with EOS or after max_tokens; beams are compared by `score`, and of the beams that have
    ended and those that are cut at max_tokens the best are returned.
    """
    # Twice as many continuations as beams: even if one of each beam's is EOS, beam_width others are left.
    has_temperature = params.temperature not in (0, 1)
    step = SamplingParams(
        temperature=0,
        max_tokens=1,
        logprobs=-1 if has_temperature else 2 * params.beam_width,
        detokenize=False,
        ignore_eos=True,
    )
    beams = [[BeamSearchSequence(tokens=list(prompt), num_prompt_tokens=len(prompt))] for prompt in prompts]
    ended: list[list[BeamSearchSequence]] = [[] for _ in prompts]

    def score(sequence: BeamSearchSequence) -> float:
        """Per token of prompt and output where length_penalty is 1; an EOS that ends it does not count."""
        length = len(sequence.tokens) - (sequence.finish_reason == "stop")
        return sequence.cum_logprob / length**params.length_penalty

    for _ in range(params.max_tokens):
        running = [(which, beam) for which, kept in enumerate(beams) for beam in kept]
        if not running:
            break
        results = generate([beam.tokens for _, beam in running], step)
        candidates: list[list[BeamSearchSequence]] = [[] for _ in prompts]
        for (which, beam), result in zip(running, results, strict=True):
            entries = result.outputs[0].logprobs
            assert entries is not None, "logprobs were asked for"
            for token_id, logprob in _likeliest(entries[0], 2 * params.beam_width, params.temperature):
                extended = BeamSearchSequence(
                    tokens=[*beam.tokens, token_id],
                    num_prompt_tokens=beam.num_prompt_tokens,
                    cum_logprob=beam.cum_logprob + logprob,
                )
                if token_id in eos_token_ids and not params.ignore_eos:
                    extended.finish_reason = "stop"
                    ended[which].append(extended)
                else:
                    candidates[which].append(extended)
        beams = [sorted(found, key=score, reverse=True)[: params.beam_width] for found in candidates]
    for kept in beams:
        for beam in kept:
            beam.finish_reason = "length"
    return [
        BeamSearchOutput(sequences=sorted(done + kept, key=score, reverse=True)[: params.beam_width])
        for done, kept in zip(ended, beams, strict=True)
    ]


def _likeliest(logprobs: Mapping[int, Logprob], count: int, temperature: float) -> list[tuple[int, float]]:
    """The likeliest tokens, lowest id first among equals; a temperature needs the whole vocabulary's."""
    assert isinstance(logprobs, LogprobsMap), "the engine's maps hold arrays"
    token_ids, values = logprobs.entries["token_id"], logprobs.entries["logprob"].astype(np.float64)
    if temperature not in (0, 1):
        values /= temperature
        values -= np.logaddexp.reduce(values)
    best = np.lexsort((token_ids, -values))[:count]
    return list(zip(token_ids[best].tolist(), values[best].tolist(), strict=True))
