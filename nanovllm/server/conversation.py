"""A conversation on its way to the engine: its prompt, what forms its answer, and who reads it.

Owns what the dialects of chat share. Invariant: what cannot be done for a conversation (a template that knows no
tools, a form beside a forced call) is known before the engine gets it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nanovllm.chat_template import OWN_OPTIONS
from nanovllm.engine.prompt_text import PromptText
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.body import BadRequest, Body, checking
from nanovllm.server.growing_calls import GrowingCalls
from nanovllm.server.reply import PlainReader, Reader, TemplateReader
from nanovllm.server.response_templates import find_response_template
from nanovllm.server.served import Served
from nanovllm.server.tools import Tools

_QUICK_SIZE = 4000  # characters


@dataclass(frozen=True)
class Prepared:
    """prompt: for the engine. new_reader: makes the reader of one answer; in a stream (True) calls grow."""

    prompt: dict[str, Any]
    params: SamplingParams
    new_reader: Callable[[bool], Reader]


@dataclass(frozen=True)
class Conversation:
    """messages: as chat templates have them. options: of `render_chat`."""

    messages: list[Any]
    options: dict[str, Any]
    tools: Tools | None = None

    async def prepare(self, served: Served, params: SamplingParams) -> Prepared:
        """Rendering and tokenizing take a while: in a thread, unless the way there takes longer."""
        if self.options.get("chat_template") is not None and not served.trust_request_chat_template:
            raise BadRequest(
                "chat_template is a program, and this server runs none that comes with a request; start it with "
                "--trust-request-chat-template for that",
                param="chat_template",
            )
        arguments = served.tokenizer, served.max_model_len, params
        if self.tools is None and len(str(self.messages)) <= _QUICK_SIZE:
            return self._prepare(*arguments)
        prepared: Prepared = await served.in_thread(self._prepare, *arguments)
        return prepared

    def _prepare(self, tokenizer: Any, max_model_len: int, params: SamplingParams) -> Prepared:
        tools, options, hf = self.tools, dict(self.options), tokenizer.hf
        schemas = tools.for_template() if tools is not None else None
        if tools is not None:
            options["tools"] = schemas
            if tools.is_forced:
                options.setdefault("enable_thinking", False)  # the call is the answer's first token on
        with checking():
            text = tokenizer.render_chat(self.messages, **options)
            token_ids = PromptText(tokenizer.encode, max_model_len).read(text, "messages", add_special_tokens=False)
        prompt = {"prompt": text, "prompt_token_ids": token_ids}
        template = hf.get_chat_template(options.get("chat_template"), schemas)
        if tools is not None and not re.search(r"\btools\b", template):
            raise BadRequest("this model's chat template knows no tools; it would not be told of them", param="tools")
        if tools is not None and tools.is_forced:
            if params.structured_outputs is not None:
                raise BadRequest("a forced tool call has a form of its own: leave the other out", param="tool_choice")
            return Prepared(prompt, replace(params, structured_outputs=tools.form()), tools.form_reader)
        with checking("tools"):
            response_template = find_response_template(hf, template, tools is not None)
        if response_template is None:
            return Prepared(prompt, params, lambda is_stream: PlainReader())
        is_parallel = tools is None or tools.is_parallel

        def new_reader(is_stream: bool) -> Reader:
            growing = GrowingCalls if is_stream else None
            return TemplateReader(response_template, text, schemas or [], is_parallel, growing)

        # A form holds from the first token on: also where the prompt has begun to reason, that text is the answer.
        if params.structured_outputs is not None and TemplateReader(response_template, text, [], True).begins_inside:
            return Prepared(prompt, params, lambda is_stream: PlainReader())
        return Prepared(prompt, replace(params, skip_special_tokens=False), new_reader)


def take_template_variables(body: Body) -> dict[str, Any]:
    """What a request tells the chat template beside its messages."""
    variables: dict[str, Any] = dict(body.take("chat_template_kwargs", dict, {}))
    for name in OWN_OPTIONS:
        if name in variables:
            raise BadRequest(f"chat_template_kwargs.{name} is no variable of a chat template", "chat_template_kwargs")
    return variables
