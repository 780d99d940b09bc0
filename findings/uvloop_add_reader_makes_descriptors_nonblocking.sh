#!/usr/bin/env bash
# uvloop's `add_reader` makes the descriptor that it watches non-blocking, for everyone who has it, and leaves it so.
#
# Expected: uvloop is a drop-in replacement of asyncio's event loop, and asyncio's `add_reader` watches a descriptor and
# changes nothing about it. A connection whose owner reads and writes it with blocking calls (multiprocessing's
# Connection, say) should go on working when a loop is told of it, at least through a duplicate of the descriptor.
# Seen: with uvloop the descriptor, and through their common file description the one it was duplicated from, do not block
# any more, also after `remove_reader`. A message that comes in two pieces is then a BlockingIOError in `recv`, which is
# an OSError, and so easily taken for the end of the other side.
# Source: uvloop 0.23.0 on libuv, `uv_poll_init` in src/unix/poll.c. What to do: watch an epoll object that watches the
# connection; that one may be non-blocking.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q uvloop==0.23.0
cat >"$folder/look.py" <<'PYTHON'
import asyncio
import os
import socket

import uvloop


async def look() -> list[bool]:
    """Does a socket block: before, while a duplicate of it is watched, after."""
    ours, _theirs = pair = socket.socketpair()
    ours.setblocking(True)
    loop, duplicate = asyncio.get_running_loop(), os.dup(ours.fileno())
    seen = [os.get_blocking(ours.fileno())]
    loop.add_reader(duplicate, print)
    seen.append(os.get_blocking(ours.fileno()))
    loop.remove_reader(duplicate)
    seen.append(os.get_blocking(ours.fileno()))
    os.close(duplicate)
    for one in pair:
        one.close()
    return seen


by_asyncio, by_uvloop = asyncio.run(look()), uvloop.run(look())
print("blocks before, while watched, after: asyncio", by_asyncio, "uvloop", by_uvloop)
assert by_asyncio == [True, True, True]
assert by_uvloop == [True, False, False]
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
