"""From the fields of a request's body to SamplingParams: OpenAI's names, and beside them vLLM's.

Owns that mapping, shared by all routes that generate. Invariant: what a field may hold is checked by `SamplingParams`
itself; its errors reach the client as they are.
"""

from typing import Any

from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.server.body import BadRequest, Body, checking
from nanovllm.structured_outputs import StructuredOutputsParams

NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTEGERS = ("n", "top_k", "seed", "min_tokens")
FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens")
LISTS = ("stop_token_ids", "allowed_token_ids", "bad_words")
IN_ORDER = "requests are begun in the order in which they came"


def take_sampling_params(
    body: Body, defaults: SamplingParams, max_tokens: int | None, is_stream: bool, **more: Any
) -> SamplingParams:
    """defaults: the model's own. max_tokens: as the route's own field says. more: what the route decides."""
    options: dict[str, Any] = {name: getattr(defaults, name) for name in (*NUMBERS, "top_k")}
    fields = {**dict.fromkeys(NUMBERS, float), **dict.fromkeys(INTEGERS, int), **dict.fromkeys(FLAGS, bool)}
    for name, kind in {**fields, **dict.fromkeys(LISTS, list)}.items():
        value = body.take(name, kind)
        if value is not None:
            options[name] = value
    options["stop"] = body.take("stop", (str, list))
    options["logit_bias"] = _take_logit_bias(body)
    options["structured_outputs"] = _take_form(body)
    options["output_kind"] = RequestOutputKind.DELTA if is_stream else RequestOutputKind.FINAL_ONLY
    if options["temperature"] == 0 and options.get("n", 1) > 1:
        raise BadRequest("n must be 1 with temperature 0: all choices would be equal", param="n")
    with checking():
        return SamplingParams(**{**options, "max_tokens": max_tokens, **more})


def _take_logit_bias(body: Body) -> dict[int, float] | None:
    biases = body.take("logit_bias", dict)
    if biases is None:
        return None
    try:
        return {int(token_id): bias for token_id, bias in biases.items()}  # JSON has no other keys than strings
    except ValueError as error:
        raise BadRequest(f"the keys of logit_bias must be token ids: {error}", param="logit_bias") from error


def _take_form(body: Body) -> StructuredOutputsParams | None:
    """`response_format` as OpenAI has it, or vLLM's `structured_outputs`."""
    with checking("response_format"):
        return _read_form(body)


def _read_form(body: Body) -> StructuredOutputsParams | None:
    own, response_format = body.take("structured_outputs", dict), body.inner("response_format")
    if response_format is None:
        return None if own is None else StructuredOutputsParams(**own)
    kind = response_format.choose("type", ("text", "json_object", "json_schema"), "text")
    schema = response_format.inner("json_schema")
    response_format.finish()
    if own is not None and kind != "text":
        raise BadRequest("response_format and structured_outputs are both given: leave one out", "response_format")
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "text":
        return None if own is None else StructuredOutputsParams(**own)
    if schema is None:
        raise BadRequest("response_format.json_schema is missing", param="response_format")
    form = schema.require("schema", dict)
    schema.ignore("name", "strict", "description")  # a form is always kept to
    schema.finish()
    return StructuredOutputsParams(json=form)
