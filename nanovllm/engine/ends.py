"""What ends a request: one rule, also where several things would end it at the same token.

    in this order                                     finish_reason  stop_reason
    1. the token completes a stop string in the text  "stop"         the string
    2. it is an EOS token of the model                "stop"         None
    3. it is one of the request's stop_token_ids      "stop"         the id
    4. the form cannot go on (a library's limit)      "error"        None, the reason is in `error`
    5. nothing but EOS could follow in the form       "stop"         None
    6. max_tokens, max_model_len or the KV cache      "length"       None

A stop string that is the text of a special token, which has none in the output, is that token: 3, and its reason is
the string. The order is vLLM's. An EOS or stop token has no text, so 1 comes before 2 and 3 only with
include_stop_str_in_output, which gives it one. Of two strings the one that begins first counts, of two that begin
together the one named first. Before min_tokens there is no 2 and no 3, since the sampler rules those tokens out, and
no 1; the other ends do not wait.

Owns the rule; the strings are looked for by the output processor, forms are kept by their constraint.
"""

from collections.abc import Callable

from nanovllm.engine.request import End, Request

FindStopString = Callable[[Request], str | None]  # the stop string that the newest token completed


def no_stop_string(request: Request) -> str | None:
    """For a scheduler without text."""
    return None


def find_end(request: Request, find_stop_string: FindStopString) -> End | None:
    """What ends the request with its newest token; None if it goes on. To be asked once for each token."""
    params = request.params
    token_id = request.token_ids[-1]
    is_stop_token = token_id in request.stop_token_ids
    has_text = not is_stop_token or params.include_stop_str_in_output
    if params.stop and has_text and (stop := find_stop_string(request)) is not None:
        return End("stop", stop)
    if is_stop_token:
        return End("stop", request.stop_reasons.get(token_id, token_id))
    if request.constraint is not None:
        if request.constraint.advance(token_id):
            return End("stop")
        if request.constraint.error is not None:
            return End("error", error=request.constraint.error)
    if len(request.token_ids) >= request.max_total_tokens:
        return End("length")
    return None
