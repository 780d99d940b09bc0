"""Some seconds of the soak: clients that leave, are slow or send nonsense leave nothing behind."""

import asyncio
import os

from tests.server import patient
from tests.server.conftest import Running
from tests.server.soak import Soak


def test_bad_clients_leave_nothing(server: Running) -> None:
    """No request, no block (the fixture looks), no descriptor; and each request is counted out."""
    soak = Soak(server.port, seed=1)

    async def run() -> None:
        await soak.run(seconds=2.5, num_clients=6)
        await soak.settle()

    asyncio.run(run())
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(run())
    patient.wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)  # the server closes its ends when it can
    assert len({kind for kind, _ in soak.outcomes}) > 3
