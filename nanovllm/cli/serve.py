"""`nanovllm serve`: an HTTP server for one model, for OpenAI's clients.

Owns the process: loading, listening, and the end. SIGTERM and Ctrl-C let what runs end, for --drain-seconds, and take
nothing new. Invariant: the port answers only once the model is ready.
"""

import logging
import os
import socket
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanovllm.cli.descriptors import allow_many_descriptors
from nanovllm.cli.options import engine_options
from nanovllm.executor.children import started_ahead
from nanovllm.interpreter import share_interpreter

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM


def run(args: Namespace) -> int:
    try:
        import httptools  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
        import uvloop  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"`nanovllm serve` needs the extra `serve`: pip install 'nanovllm[serve]' ({error})"
        ) from error
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    key = _read_key(args.api_key)
    template = Path(args.chat_template).read_text() if args.chat_template is not None else None
    allow_many_descriptors()
    listener = _listen(args.host, args.port)
    options = {"engine_process": True, **engine_options(args)}
    with started_ahead("nanovllm.replica", options.get("data_parallel_size", 1)):
        return _serve(args, options, key, template, listener)


def _serve(
    args: Namespace, options: dict[str, Any], key: str | None, template: str | None, listener: socket.socket
) -> int:
    import uvicorn
    import uvloop

    from nanovllm.server.adapters import ALLOW, read_modules
    from nanovllm.server.app import make_app
    from nanovllm.server.http import BoundedHttp
    from nanovllm.server.live import DEV_MODE
    from nanovllm.server.served import Served

    adapters = read_modules(args.lora_modules)
    if adapters:
        most = max(len(adapters), options.get("max_loras", 1))
        options = {"enable_lora": True, "max_cpu_loras": most, **options}
    make_engine = partial(_make_engine, args.model, options, template)
    served = Served(
        make_engine(),
        args.served_model_name or [args.model],
        args.max_unfinished,
        args.trust_request_chat_template,
        adapters,
    )
    for adapter in adapters.values():
        served.engine.llm.add_lora(adapter)
    share_interpreter()
    config = uvicorn.Config(
        make_app(
            served,
            key,
            args.allowed_origins,
            make_engine if args.restart else None,
            updates_adapters=_is_on(ALLOW),
            dev_mode=_is_on(DEV_MODE),
        ),
        http=BoundedHttp,
        ws="none",
        log_config=None,
        access_log=False,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        timeout_graceful_shutdown=args.drain_seconds,
    )
    scheme = "https" if args.ssl_certfile else "http"
    host, port = listener.getsockname()[:2]

    class Server(uvicorn.Server):
        should_exit: bool
        force_exit: bool

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            took = perf_counter() - args.start_time
            print(f"ready after {took:.1f} s: {scheme}://{host}:{port}/v1", file=sys.stderr, flush=True)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """The first signal lets requests end, the second does not."""
            self.force_exit = self.should_exit
            self.should_exit = served.is_draining = True

    uvloop.run(Server(config).serve(sockets=[listener]))
    return 0


def _make_engine(model: str, options: dict[str, Any], chat_template: str | None) -> "AsyncLLM":
    from nanovllm.async_llm import AsyncLLM  # behind what is wrong with the port or the key

    engine = AsyncLLM(model, **options)
    if chat_template is not None:
        engine.llm.get_tokenizer().chat_template = chat_template
    return engine


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() not in ("", "0", "false")


def _read_key(given: str | None) -> str | None:
    """An empty one, of a variable that is not set, would let in whom it was meant to keep out."""
    key = os.environ.get("NANOVLLM_API_KEY") if given is None else given
    if key is not None and not key.strip():
        source = "$NANOVLLM_API_KEY" if given is None else "--api-key"
        raise ValueError(
            f"the key in {source} is empty; give one, or leave {source} out for a server that asks for none"
        )
    return key


def _listen(host: str, port: int) -> socket.socket:
    """Taken before the model is loaded, so that a port that is taken is known at once; nothing is accepted yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host") from error
    return listener
