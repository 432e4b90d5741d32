"""How the ranks of one start find each other where the launcher's store still has what those of an earlier start wrote.

torchrun keeps its store when it starts the ranks again, and torch looks in it for addresses: a rank that comes before
another one finds that one's old address, cannot connect, and the restart fails.
"""

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

INTERVAL = 0.02  # seconds between two looks


def is_launchers_store() -> bool:
    """Whether torchrun holds the store of the ranks' rendezvous; without it rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def join(backend: str, rank: int, world: int, timeout: timedelta) -> None:
    """Make the process group; under torchrun, of this start's ranks alone."""
    if not is_launchers_store():
        dist.init_process_group(backend, timeout=timeout)
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    name = namespace_of_start(store, rank, world, timeout)
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world, timeout=timeout)


def namespace_of_start(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name that the main rank drew and only the ranks of this start know; DistStoreError where one does not come.

    A rank says hello with a number of its own and waits until the main one has answered just that. The main rank
    answers each hello that it finds, an old one as well, until all ranks have repeated the name.
    """
    until = time.monotonic() + timeout.total_seconds()
    mine, answered = secrets.token_hex(8), {other: "" for other in range(1, world)}
    if rank:
        store.set(f"start/hello/{rank}", mine)
        while (answer := _read(store, f"start/answer/{rank}")).partition(" ")[0] != mine:
            _nap(until, "rank 0")
        name = answer.partition(" ")[2]
        store.set(f"start/thanks/{rank}", name)
        return name
    while answered:
        for other, known in [*answered.items()]:
            if (hello := _read(store, f"start/hello/{other}")) != known:
                answered[other] = hello
                store.set(f"start/answer/{other}", f"{hello} {mine}")
            if _read(store, f"start/thanks/{other}") == mine:
                del answered[other]
        _nap(until, f"ranks {[*answered][:8]}")
    return mine


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _nap(until: float, whom: str) -> None:
    if time.monotonic() > until:
        raise dist.DistStoreError(f"waited in vain for {whom} to start")
    time.sleep(INTERVAL)
