"""HTTP/1.1 on a connection, by uvicorn and httptools, with bounds on the head of a request, which they have none for.

Owns those bounds, and the short way for parts of an answer. Invariant: whoever connects holds a descriptor for
`HEAD_SECONDS` and `MAX_HEAD_BYTES` of memory at most, until a whole head has come, of which the key may be a part.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2**16  # besides what comes in one read
HEAD_SECONDS = 30.0


class BoundedHttp(HttpToolsProtocol):
    _is_in_head = True
    _head_size = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_in_head:
            return
        self._head_size += len(data)
        if self._head_size > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._head_size = True, 0
        if self._deadline is None:  # of a connection that was kept alive, uvicorn's own clock ends with the first byte
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_clock()
        self.scope["state"]["connection"] = self
        super().on_headers_complete()

    @property
    def can_write(self) -> bool:
        """Whether there is room for a part of an answer, and somebody who may read it."""
        return not (self.flow.write_paused or self.transport.is_closing())

    def write_part(self, data: bytes) -> None:
        """Of an answer of unknown length, whose head was sent; as ASGI's `send` does, in a tenth of its time."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
