"""Which pages are trained on when: every rank its own, all ranks as many."""

import random
from types import SimpleNamespace

import pytest

from training.errors import SettingsError
from training.page_order import PageSampler


def test_no_page_comes_twice_and_all_ranks_have_as_many_batches(monkeypatch):
    for count, micro, accumulated, ranks in ((50, 2, 2, 3), (17, 1, 8, 2), (9, 4, 1, 2), (3, 2, 2, 3), (24, 2, 4, 3)):
        args = SimpleNamespace(
            per_device_train_batch_size=micro, gradient_accumulation_steps=accumulated, seed=7, data_seed=None
        )
        batches = []
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(ranks))
            sampler = PageSampler([1.0 + page % 5 for page in range(count)], args)
            batches.append(list(sampler))
            assert len(batches[-1]) == len(sampler)
            assert all(1 <= len(batch) <= micro for batch in batches[-1])
        assert len({len(mine) for mine in batches}) == 1
        seen = [page for mine in batches for batch in mine for page in batch]
        assert len(seen) == len(set(seen)) == count // ranks * ranks
        sampler.set_epoch(1)
        assert count < 10 or list(sampler) != batches[-1], "another epoch, another order"


def steps_on(ranks: int, count: int, micro: int, accumulated: int, began_on: int, monkeypatch) -> list[list[int]]:
    """The pages of each step, as the ranks' own batches give them."""
    args = SimpleNamespace(
        per_device_train_batch_size=micro, gradient_accumulation_steps=accumulated, seed=7, data_seed=None
    )
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    steps: dict[int, list[int]] = {}
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        sampler = PageSampler([1.0 + page % 5 for page in range(count)], args, began_on)
        batches = list(sampler)
        assert len(batches) == len(sampler) and all(1 <= len(batch) <= micro for batch in batches)
        for number, batch in enumerate(batches):
            steps.setdefault(number // accumulated, []).extend(batch)
    return [sorted(pages) for pages in steps.values()]


@pytest.mark.parametrize("count", [17, 23, 24, 31, 1000])
def test_a_run_has_the_same_steps_on_any_number_of_processes(count, monkeypatch):
    """16 pages a step. What the last step has and cannot be dealt out is left out of it; a step is never lost."""
    for began_on in (1, 2, 4):
        begun = steps_on(began_on, count, 2, 8 // began_on, began_on, monkeypatch)
        for ranks, micro in ((1, 1), (1, 16), (2, 1), (2, 4), (4, 2), (8, 1)):
            last = len(begun[-1])
            if last < ranks:
                with pytest.raises(
                    SettingsError, match=f"last step has {last}, .* began with {began_on}: take as many"
                ):
                    steps_on(ranks, count, micro, 16 // micro // ranks, began_on, monkeypatch)
                continue
            now = steps_on(ranks, count, micro, 16 // micro // ranks, began_on, monkeypatch)
            assert now[:-1] == begun[:-1] and len(now) == len(begun)
            assert set(now[-1]) <= set(begun[-1]) and last - len(now[-1]) < ranks
            assert now == begun or last % ranks, "left out without need"


def test_no_rank_has_the_dearest_pages_of_each_micro_batch(monkeypatch):
    """All wait for the one that has most, at the end of each step."""
    generator = random.Random(7)
    costs = [generator.uniform(60, 130) for _ in range(16 * 40)]
    args = SimpleNamespace(per_device_train_batch_size=4, gradient_accumulation_steps=2, seed=7, data_seed=None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    sums = [
        [sum(costs[page] for group in mine for page in group) for mine in (groups[::2], groups[1::2])]
        for groups in PageSampler(costs, args).steps()
    ]
    dearer = sum(first > second for first, second in sums)
    assert 10 < dearer < 30, f"the first rank has more in {dearer} of 40 steps"
    longest = sum(2 * max(step) / sum(step) - 1 for step in sums) / 40
    assert longest < 0.006, f"{longest:.2%} of a step is waited for"


def test_the_order_is_drawn_by_the_data_seed_where_one_is_typed():
    def order(**seeds: int | None) -> list[list[int]]:
        args = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=2, **seeds)
        return list(PageSampler([1.0] * 24, args))

    plain = order(seed=7, data_seed=None)
    assert order(seed=42, data_seed=7) == order(seed=7, data_seed=7) == plain
    assert order(seed=7, data_seed=8) != plain
