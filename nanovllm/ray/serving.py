"""build_openai_app: the server's app as a deployment of Ray Serve.

Owns putting the two together: replicas, routing and scaling are Ray's, routes and streams are `server/`'s. Invariant:
each replica has an engine of its own, made where the replica runs.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any


def build_openai_app(
    model: str,
    *,
    served_model_name: str | Sequence[str] | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
    api_key: str | None = None,
    **deployment_options: Any,
) -> Any:
    """An application for `serve.run`. engine_kwargs: options of `LLM`. deployment_options: of `serve.deployment`, such
    as num_replicas and ray_actor_options. Raises ImportError without Ray Serve.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError(f"this needs Ray Serve: pip install 'ray[serve]' 'nanovllm[serve]' ({error})") from error
    names = [served_model_name] if isinstance(served_model_name, str) else list(served_model_name or [model])
    options = {"use_tqdm_on_load": False, **(engine_kwargs or {})}

    def build() -> Any:
        """In the replica."""
        from nanovllm.async_llm import AsyncLLM
        from nanovllm.server.app import make_app
        from nanovllm.server.served import Served

        served = Served(AsyncLLM(model, **options), names, max_unfinished=sys.maxsize)  # Ray has bounds of its own
        return make_app(served, api_key)

    return serve.deployment(**deployment_options)(serve.ingress(build)()).bind()
