"""The ranks of a start find each other and no rank of an earlier one, in whatever order they come."""

import random
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megapoly.parallel.joining import namespace_of_start


def started(store: dist.Store, world: int, delays: list[float]) -> list[str]:
    """The name that each rank of a start gets, rank by rank that comes after its delay."""
    names = [""] * world

    def run(rank: int) -> None:
        time.sleep(delays[rank])
        names[rank] = namespace_of_start(store, rank, world, timedelta(seconds=20))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.mark.parametrize("seed", range(6))
def test_each_start_has_one_name_of_its_own(seed: int) -> None:
    rng, store, seen = random.Random(seed), dist.HashStore(), set()
    for _ in range(4):
        names = started(store, 4, [rng.choice([0, 0.1, 0.3]) for _ in range(4)])
        assert len(set(names)) == 1 and names[0]
        assert names[0] not in seen
        seen.add(names[0])


@pytest.mark.parametrize("came", [[0], [1, 2], [0, 2]])
def test_a_start_in_which_a_rank_is_missing_does_not_take_an_old_one_for_it(came: list[int]) -> None:
    store = dist.HashStore()
    started(store, 3, [0, 0, 0])
    failures = []

    def run(rank: int) -> None:
        try:
            namespace_of_start(store, rank, 3, timedelta(seconds=0.5))
        except dist.DistStoreError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in came]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any("waited in vain" in failure for failure in failures)
    assert (0 in came) == any("to start" in failure and "ranks [" in failure for failure in failures)


def test_one_rank_alone_needs_nobody() -> None:
    assert namespace_of_start(dist.HashStore(), 0, 1, timedelta(seconds=1))
