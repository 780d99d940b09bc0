"""Forked children: processes that tests let the engine start begin with what they would import, which takes seconds.

    a test ── engine ── start_child ── Fork ──request──► server, which has imported torch ──fork──► the child

Owns one server for the process that runs tests, started when the first child is. What differs from a real child is
only what that does before its module's first line; scripts that tests run, and modules that are not named here, start
real ones. Invariant: a child has the descriptors, the environment and the standard streams that `subprocess.Popen`
would have given it, and no others.
"""

import fcntl
import gc
import importlib
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

MODULES = ("nanovllm.executor.worker_process", "nanovllm.replica", "tests.executor.rank_process")


class ForkServer:
    """Its connection: a request and its descriptors go out, the child's number comes back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None

    def fork(self, request: dict[str, Any], fds: Sequence[int]) -> int:
        with self._lock:
            connection = self._connection = self._connection or self._start()
            message = pickle.dumps(request)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
            connection.sendmsg([len(message).to_bytes(4, "little")], rights)
            connection.sendall(message)
            answer = connection.recv(4)
            if not answer:
                raise ConnectionError("the server that forks children has ended")  # number 0 would be a group's
            return int.from_bytes(answer, "little")

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(sys.path)
            command = [sys.executable, "-P", "-m", "tests.forked_children", str(theirs.fileno()), str(os.getpid())]
            environment = {**os.environ, "PYTHONPATH": path}
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment
            )
        return ours

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self.process.wait()


class Fork:
    """What `start_child` uses of a `subprocess.Popen`."""

    def __init__(self, server: ForkServer, command: Sequence[str], pass_fds: Sequence[int], env: Any) -> None:
        self.returncode: int | None = None
        self._status, status = os.pipe()
        request = {"command": command, "numbers": pass_fds, "env": env, "folder": os.getcwd()}
        self.pid = server.fork(request, [status, 1, 2, *pass_fds])
        os.close(status)

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._look(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("a forked child", timeout or 0)
        return status

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            status = os.waitstatus_to_exitcode(int.from_bytes(os.read(self._status, 4), "little"))
            self.returncode = status
            os.close(self._status)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Subprocess:
    """Stands for the module `subprocess` in `nanovllm.executor.children`."""

    DEVNULL, TimeoutExpired = subprocess.DEVNULL, subprocess.TimeoutExpired

    def __init__(self) -> None:
        self.server = ForkServer()

    def Popen(self, command: Sequence[str], *, stdin: int, pass_fds: Sequence[int], env: dict[str, str]) -> Any:
        is_known = command[:3] == [sys.executable, "-P", "-m"] and command[3] in MODULES
        if is_known and not sys.modules["torch"].cuda.is_available():  # CUDA does not live on in a fork
            return Fork(self.server, command, pass_fds, env)
        return subprocess.Popen(command, stdin=stdin, pass_fds=pass_fds, env=env)


# -- in the server --


def serve(connection: socket.socket, parent: int) -> dict[str, Any] | None:
    """Fork for each request. Returns in a child, with its request; in the server at the end of the connection."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipes: dict[int, int] = {}
    while True:
        ready = select.select([connection, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            while pipes and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with suppress(BrokenPipeError):  # nobody asks any more
                    os.write(pipes[ended[0]], ended[1].to_bytes(4, "little"))
                os.close(pipes.pop(ended[0]))
        if connection not in ready:
            continue
        length, fds, _, _ = socket.recv_fds(connection, 4, 64)
        if not length:
            return None
        message = bytearray()
        while len(message) < int.from_bytes(length, "little"):
            message += connection.recv(65536)
        request = pickle.loads(message)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for fd in (woken, wake, fds[0], *pipes.values()):
                os.close(fd)
            connection.close()
            become(request, fds[1:], parent)
            return request
        pipes[pid] = fds[0]
        for fd in fds[1:]:
            os.close(fd)
        connection.sendall(pid.to_bytes(4, "little"))


def become(request: dict[str, Any], fds: Sequence[int], parent: int) -> None:
    """This process, just forked, is to look as if `parent` had started it."""
    numbers = 1, 2, *request["numbers"]  # in the process that runs tests
    held = [fcntl.fcntl(fd, fcntl.F_DUPFD, max(numbers) + 1) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(held, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    path = request["env"]["PYTHONPATH"].split(os.pathsep)
    sys.path[:] = dict.fromkeys([*path, *sys.path])
    sys.argv = request["command"][3:]
    getppid, server = os.getppid, os.getppid()
    os.getppid = lambda: parent if getppid() == server else getppid()  # the server ends when the parent does


def main() -> None:
    for name in (*MODULES, "transformers"):
        importlib.import_module(name)
    for name in MODULES:  # each child runs one of them as its main module, as if it had not been imported
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # no child looks at it again
    assert len(os.listdir("/proc/self/task")) == 1, "threads are not there in a fork"
    request = serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    if request is not None:
        runpy.run_module(request["command"][3], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
