"""Many clients at once that behave as badly as clients do, and what a server must have left of them: nothing.

    python -m tests.server.soak --minutes 10 [--seed N]      a server of its own; memory and descriptors are watched
    test_soak.py                                             the same clients for some seconds

Owns the clients, one coroutine each, and the sums at the end. Everything random comes from the seed, but for who comes
first. Invariant: each answer is looked at; a status of 500 or a stream that stops in its middle ends the soak.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

HI = [{"role": "user", "content": "Hi"}]
FUNCTION = {"name": "paint", "parameters": {"type": "object", "properties": {"x": {"enum": ["a", "b"]}}}}
# Each dialect: its route, its body, and how a stream of it ends (None: there is no stream).
DIALECTS: dict[str, tuple[dict[str, Any], bytes | None]] = {
    "/v1/chat/completions": ({"messages": HI, "max_tokens": 30}, b"data: [DONE]"),
    "/v1/completions": ({"prompt": ["ab", "cd"], "max_tokens": 30, "n": 2, "logprobs": 1}, b"data: [DONE]"),
    "/v1/responses": ({"input": "Hi", "max_output_tokens": 30}, b'"type": "response.completed"'),
    "/v1/messages": ({"messages": HI, "max_tokens": 30}, b'"type": "message_stop"'),
    "/inference/v1/generate": ({"token_ids": [97, 98], "sampling_params": {"max_tokens": 30}}, b"data: [DONE]"),
    "/v1/messages/count_tokens": ({"messages": HI}, None),
    "/v1/embeddings": ({"input": ["ab", "cde"]}, None),
    "/tokenize": ({"prompt": "some text"}, None),
    "/detokenize": ({"tokens": [97, 98]}, None),
}
JUNK = [None, True, -1, 0, 10**30, 1e308, "", "\u0000", "x" * 5000, [], [[]], {}, {"type": "?"}, [None], ["a", 1]]


def _doubled(depth: int) -> dict[str, Any]:
    """A schema of so many letters that allows 2 ** depth texts."""
    texts: dict[str, Any] = {"a0": {"type": "string"}}
    for i in range(depth):
        inner = {"$ref": f"#/$defs/a{i}"}
        texts[f"a{i + 1}"] = {"type": "object", "properties": {"x": inner, "y": inner}, "required": ["x", "y"]}
    return {"$defs": texts, "$ref": f"#/$defs/a{depth}"}


FORMS: list[dict[str, Any]] = [
    {"regex": "(a{1,1000}){1,1000}"},
    {"regex": "(.*a){30}"},
    {"regex": "(a|b)*a(a|b){30}"},
    {"regex": "(" * 500 + "a+" + ")" * 500},
    {"regex": "(?=a)a"},
    {"json": _doubled(40)},
    {"json": {"$ref": "#"}},
    {"json": {"$ref": "https://example.invalid/schema.json"}},
    {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6}},
    {"json": {"type": "string", "maxLength": 10**9, "pattern": "^(a+)+$"}},
    {"json": {"enum": [f"{i:x}" for i in range(3000)]}},
    {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}},
    {"json": {"allOf": [{"properties": {f"p{i}": {"minimum": i}}} for i in range(100)]}},
    {"json": {"type": "integer", "minimum": -(10**40)}},
    {"grammar": 'start: start start | "a"'},
    {"grammar": 'start: a a a a a a a a\na: | a a | "x"'},
    {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(300)) + '\nr300: "a"'},
    {"choice": [f"{i}" for i in range(3000)]},
    {"choice": []},
]


class Soak:
    """outcomes: how often each kind of client had which end."""

    def __init__(self, port: int, seed: int) -> None:
        self.outcomes: Counter[tuple[str, Any]] = Counter()
        self._port, self._random = port, random.Random(seed)

    async def run(self, seconds: float, num_clients: int = 12) -> None:
        """Raises AssertionError for what no server may do."""
        end = time.monotonic() + seconds
        kinds: list[Callable[[], Awaitable[Any]]] = [
            self.whole, self.stream, self.leaves, self.leaves_early, self.slow, self.wrong, self.broken, self.form,
            self.called, self.looks,
        ]  # fmt: skip

        async def client() -> None:
            while time.monotonic() < end:
                kind = self._random.choice(kinds)
                self.outcomes[kind.__name__, await kind()] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(num_clients):
                group.create_task(client())

    # -- the kinds of clients; each returns its end --

    async def whole(self) -> int:
        path, body, _ = self._valid()
        return await self._status(path, json.dumps(body).encode(), (200, 429))

    async def stream(self) -> int:
        path, body, end = self._valid(is_stream=True)
        status, answer = await self._ask(path, json.dumps(body).encode())
        assert status == 429 or (status == 200 and end in answer), (path, status, answer[-300:])
        return status

    async def leaves(self) -> str:
        """In the middle of a stream, politely or not."""
        path, body, _ = self._valid(is_stream=True, many=True)
        reader, writer = await self._connect()
        try:
            writer.write(self._request(path, json.dumps(body).encode()))
            await reader.read(self._random.choice((1, 400, 4000)))
        finally:
            await self._part(writer)
        return "left"

    async def leaves_early(self) -> str:
        """Before there is an answer: in the head, in the body, or while the engine works."""
        path, body, _ = self._valid(many=True)
        request = self._request(path, json.dumps(body).encode())
        _, writer = await self._connect()
        try:
            writer.write(request[: self._random.choice((0, 10, len(request) - 5, len(request)))])
            await asyncio.sleep(self._random.choice((0, 0.02, 0.2)))
        finally:
            await self._part(writer)
        return "left"

    async def slow(self) -> str:
        """Reads less than comes; some to the end."""
        path, body, end = self._valid(is_stream=True, many=True)
        reader, writer = await self._connect(limit=1000)
        answer = b""
        try:
            writer.write(self._request(path, json.dumps(body).encode()))
            for _ in range(self._random.randrange(20)):
                answer += await reader.read(300)
                await asyncio.sleep(0.03)
            if self._random.random() < 0.3:
                while data := await reader.read(2**16):
                    answer += data
                assert b" 429 " in answer[:20] or end in answer, (path, answer[-300:])
                return "read all"
        finally:
            await self._part(writer)
        return "left"

    async def wrong(self) -> int:
        """A body of which one field is anything."""
        path, body, _ = self._valid()
        names = [*body, "temperature", "stop", "tools", "tool_choice", "response_format", "logit_bias", "stream", "zzz"]
        body[self._random.choice(names)] = self._random.choice(JUNK)
        return await self._status(path, json.dumps(body).encode(), (200, 400, 404, 429))

    async def broken(self) -> int:
        """A body that is none."""
        text = json.dumps(self._valid()[1]).encode()
        bodies = [
            text[: self._random.randrange(len(text))], text.replace(b'"', b"'"), b"\xff" + text, b"[" * 50_000,
            b'{"a":' * 70 + b"1" + b"}" * 70, b'{"prompt": ' + b"9" * 5000 + b"}", b"[" + b"," * 4_000_001,
        ]  # fmt: skip
        return await self._status("/v1/completions", self._random.choice(bodies), (400, 413))

    async def form(self) -> int:
        """A form that takes long to be made a mask of, or cannot be one."""
        body = {"prompt": "a", "max_tokens": 8, "structured_outputs": self._random.choice(FORMS)}
        return await self._status("/v1/completions", json.dumps(body).encode(), (200, 400, 429))

    async def called(self) -> int:
        tool = {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"}
        body = {"messages": HI, "max_tokens": 40, **tool, "stream": self._random.random() < 0.5}
        status, answer = await self._ask("/v1/chat/completions", json.dumps(body).encode())
        assert status in (200, 400, 429), (status, answer[-500:])
        assert status != 200 or not body["stream"] or b"data: [DONE]" in answer, answer[-500:]
        return status

    async def looks(self) -> int:
        path = self._random.choice(("/metrics", "/health", "/v1/models", "/load", "/v1/nothing", "/v1/completions"))
        status, _ = await self._ask(path, None)
        assert status in (200, 404, 405), (path, status)
        return status

    # -- HTTP, by hand: a client library would behave --

    def _valid(self, *, is_stream: bool = False, many: bool = False) -> tuple[str, dict[str, Any], bytes]:
        path = self._random.choice([path for path, (_, end) in DIALECTS.items() if end is not None or not is_stream])
        given, end = DIALECTS[path]
        body = {**given, **({"stream": True} if is_stream else {})}
        if many:
            for owner in (body, body.get("sampling_params", {})):
                for name in ("max_tokens", "max_output_tokens"):
                    if name in owner:
                        owner[name] = 600
        return path, body, end or b""

    async def _connect(self, limit: int = 2**16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port, limit=limit)

    def _request(self, path: str, body: bytes | None) -> bytes:
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: soak\r\nconnection: close\r\n"
        if body is not None:
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + (body or b"")

    async def _part(self, writer: asyncio.StreamWriter) -> None:
        if self._random.random() < 0.5:
            writer.transport.abort()  # what is still unread makes this a reset
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async def _ask(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        reader, writer = await self._connect()
        answer = b""
        try:
            writer.write(self._request(path, body))
            async with asyncio.timeout(300):
                with suppress(ConnectionError):  # the server may answer, and close, before it has read all
                    while data := await reader.read(2**16):
                        answer += data
        finally:
            await self._part(writer)
        status = re.match(rb"HTTP/1.1 (\d+) ", answer)
        assert status is not None, (path, answer[:200])
        return int(status[1]), answer

    async def _status(self, path: str, body: bytes, expected: tuple[int, ...]) -> int:
        status, answer = await self._ask(path, body)
        assert status in expected, (path, body[:500], status, answer[-500:])
        return status

    async def settle(self) -> dict[str, float]:
        """The server's metrics, once nothing runs. Raises AssertionError for a request that is left, or not counted."""
        deadline = time.monotonic() + 120
        while True:
            _, answer = await self._ask("/metrics", None)
            found = re.findall(rb"^vllm:(\w+)(\{[^}]*\})? ([-+.e\d]+)$", answer, re.MULTILINE)
            sums: Counter[str] = Counter()
            for name, _, value in found:
                sums[name.decode()] += float(value)
            held = sums["num_requests_running"] + sums["num_requests_waiting"] + sums["kv_cache_usage_perc"]
            uncounted = sums["request_params_n_count"] - sums["e2e_request_latency_seconds_count"]
            _, load = await self._ask("/load", None)
            if not held and not uncounted and b'{"server_load":0}' in load:
                return dict(sums)
            assert time.monotonic() < deadline, f"a request or a block is left: {sums}, {load!r}"
            await asyncio.sleep(0.1)


# -- as a program --


def _used(pids: list[int]) -> list[tuple[float, int]]:
    """Of each process: resident MiB, and open descriptors."""
    used = []
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        resident = re.search(r"VmRSS:\s+(\d+)", status)
        assert resident is not None
        used.append((int(resident[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))))
    return used


async def _watch(pids: list[int], samples: list[list[tuple[float, int]]]) -> None:
    while True:
        await asyncio.sleep(5)
        samples.append(_used(pids))
        if len(samples) % 12 == 0:
            print(f"{len(samples) * 5:5d} s  " + "  ".join(f"{mib:.0f} MiB {fds} fds" for mib, fds in samples[-1]))


async def _soak_process(process: "subprocess.Popen[str]", port: int, seconds: float, seed: int) -> None:
    soak = Soak(port, seed)
    await soak.run(min(20, seconds))  # what is loaded and cached once
    await soak.settle()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    pids = [process.pid, *map(int, children)]
    before = _used(pids)
    samples: list[list[tuple[float, int]]] = []
    watch = asyncio.create_task(_watch(pids, samples))
    await soak.run(seconds)
    watch.cancel()
    sums = await soak.settle()
    await asyncio.sleep(6)  # uvicorn ends connections that were kept alive
    after = _used(pids)
    for (kind, end), count in sorted(soak.outcomes.items(), key=str):
        print(f"{kind:12} {end!s:8} {count:7d}")
    print(f"requests {sums['request_params_n_count']:.0f}, output tokens {sums['generation_tokens_total']:.0f}")
    for i, pid in enumerate(pids):
        resident = [sample[i][0] for sample in samples] or [after[i][0]]
        middle, last = (statistics.median(resident[len(resident) * a // 6 : len(resident) * b // 6 + 1])
                        for a, b in ((2, 3), (5, 6)))  # fmt: skip
        print(f"process {pid}: MiB {before[i][0]:.0f} -> {after[i][0]:.0f}, in the middle {middle:.0f}, "
              f"in the last sixth {last:.0f}; descriptors {before[i][1]} -> {after[i][1]}")  # fmt: skip
        assert after[i][1] <= before[i][1], "descriptors are left open"
        assert last < 1.1 * middle + 10, "memory grows"


def main() -> None:
    from tests.tiny_models import edit_json, save_scripted

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        save_scripted(Path(folder), "abcdefgh", ends=False)
        edit_json(Path(folder) / "config.json", max_position_embeddings=2000)
        template = Path(__file__).parents[2] / "examples/tools.jinja"
        (Path(folder) / "chat_template.jinja").write_text(template.read_text())
        command = [sys.executable, "-m", "nanovllm.cli.main", "serve", folder, "--port", "0", "--device", "cpu"]
        options = ["--dtype", "float32", "--max-num-seqs", "8", "--num-gpu-blocks-override", "300"]
        limits = ["--max-unfinished", "16", "--log-level", "error"]
        process = subprocess.Popen([*command, *options, *limits], stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            ready = next((line for line in process.stderr if line.startswith("ready")), "")
            found = re.search(r"127\.0\.0\.1:(\d+)", ready)
            assert found is not None, "the server did not start"
            asyncio.run(_soak_process(process, int(found[1]), args.minutes * 60, args.seed))
        finally:
            process.terminate()
            errors = process.communicate(timeout=60)[1]
            assert not errors, errors[-3000:]


if __name__ == "__main__":
    main()
