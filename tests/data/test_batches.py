"""Which rows make which update: the same for any number of processes."""

from __future__ import annotations

import itertools
import random

import pytest

from craft_cli.data.batches import plan_epoch, share_out

LENGTHS = random.Random(3).choices(range(4, 128), k=4003)


def padding(updates: list[list[int]]) -> int:
    return sum(
        max(LENGTHS[row] for row in update) * len(update) - sum(LENGTHS[row] for row in update) for update in updates
    )


@pytest.mark.parametrize(("rows", "size"), [(4003, 32), (10, 32), (32, 32), (33, 32), (1, 1), (7, 2)])
def test_an_epoch_takes_each_row_once_in_full_updates(rows: int, size: int) -> None:
    updates = plan_epoch(LENGTHS[:rows], size, seed=42, epoch=0)
    assert sorted(itertools.chain(*updates)) == list(range(rows))
    assert len(updates) == -(-rows // size)
    assert sorted(map(len, updates))[1:] == [size] * (len(updates) - 1)


def test_the_order_hangs_on_seed_and_epoch_alone() -> None:
    def plan(seed: int, epoch: int) -> list[list[int]]:
        return plan_epoch(LENGTHS, 16, seed=seed, epoch=epoch)

    assert plan(42, 0) == plan(42, 0)
    plans = [plan(seed, epoch) for seed, epoch in itertools.product((1, 42), (0, 1, 2))]
    assert all(first != second for first, second in itertools.combinations(plans, 2))
    assert {frozenset(update) for update in plans[0]} != {frozenset(update) for update in plans[1]}


def test_rows_of_an_update_have_nearly_the_same_length() -> None:
    updates = plan_epoch(LENGTHS, 16, seed=42, epoch=0)
    order = random.Random(0).sample(range(len(LENGTHS)), len(LENGTHS))
    at_random = [order[start : start + 16] for start in range(0, len(order), 16)]
    assert padding(updates) < 0.1 * padding(at_random)


def test_the_order_of_updates_is_not_that_of_their_length() -> None:
    updates = plan_epoch(LENGTHS[:1600], 16, seed=42, epoch=0)
    longest = [max(LENGTHS[row] for row in update) for update in updates]
    rising = sum(first < second for first, second in itertools.pairwise(longest))
    assert 0.3 < rising / (len(longest) - 1) < 0.7


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("missing", [0, 1, 5, 11])
def test_processes_and_accumulation_share_an_update_out(processes: int, accumulation: int, missing: int) -> None:
    size = 4 * processes * accumulation
    rows = max(1, size - missing)
    update = list(range(100, 100 + rows))
    shares = [share_out(update, 4, process=process, processes=processes) for process in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) <= accumulation
    batches = list(itertools.chain(*shares))
    assert all(len(batch) <= 4 for batch in batches)
    assert sorted(itertools.chain(*batches)) == update
    if not missing:
        assert all(len(batch) == 4 for batch in batches)


def test_several_processes_take_the_rows_of_one() -> None:
    update = [5, 3, 8, 1, 9, 2, 7]
    assert share_out(update, 8, process=0, processes=1) == [update]
    assert share_out(update, 2, process=0, processes=2) == [[5, 3], [9, 2]]
    assert share_out(update, 2, process=1, processes=2) == [[8, 1], [7]]
    assert share_out(update[:5], 2, process=1, processes=2) == [[8, 1], []]  # takes part without rows
