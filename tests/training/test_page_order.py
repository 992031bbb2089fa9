"""Which pages are trained on when: every rank its own, all ranks as many."""

from types import SimpleNamespace

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


def test_the_order_is_drawn_by_the_data_seed_where_one_is_typed():
    def order(**seeds: int | None) -> list[list[int]]:
        args = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=2, **seeds)
        return list(PageSampler([1.0] * 24, args))

    plain = order(seed=7, data_seed=None)
    assert order(seed=42, data_seed=7) == order(seed=7, data_seed=7) == plain
    assert order(seed=7, data_seed=8) != plain
