"""A forked child finds what a real one finds; without a server to fork it, none is said to have started."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.executor import children
from tests.forked_children import Fork, ForkServer


def found(start: Callable[..., Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    command = [sys.executable, "-P", "-m", "tests.executor.child_probe", str(writing), "more"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "ONLY_HERE": "1"}
    del environment["PATH"]
    child = start(command, [writing], environment)
    os.close(writing)
    with open(reading) as answer:
        said = json.load(answer)
    assert child.wait(60) == child.poll() == 7
    return said


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA no child is forked")
def test_it_finds_what_a_real_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server: ForkServer = children.subprocess.server  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    forked = found(lambda command, fds, env: Fork(server, command, fds, env))
    real = found(lambda *start: subprocess.Popen(start[0], stdin=subprocess.DEVNULL, pass_fds=start[1], env=start[2]))
    assert forked == real


def test_a_server_that_ends_before_it_answers_is_said() -> None:
    server = ForkServer()
    server._connection, theirs = socket.socketpair()
    with server._connection, theirs:
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError, match="has ended"):
            server.fork({}, [0])
