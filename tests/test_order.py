"""The order of clips: a pure function of seed and step, with exact shares, whole passes, one shape a batch."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from data.order import Mix, Order, SampleRef, ShardRange, Source, _Passes, check_batch_size, clips_of_device

LARGE, SMALL = "25x64x64", "13x32x32"


def two_sources(weights: tuple[float, float] = (1.0, 2.0)) -> list[Source]:
    faces = tuple(ShardRange(number, 10 + number % 3, LARGE) for number in range(7))
    sounds = tuple(ShardRange(7 + number, 9, SMALL if number % 3 == 0 else LARGE) for number in range(6))
    return [Source("faces", weights[0], faces), Source("sounds", weights[1], sounds)]


def make_order(*, seed: int = 0, batch_size: int | dict[str, int] = 6, weights=(1.0, 2.0), **options) -> Order:
    return Order(two_sources(weights), batch_size=batch_size, seed=seed, **options)


def place(ref: SampleRef) -> tuple[int, int]:
    return ref.shard, ref.index


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    one, two = make_order(), make_order()
    forwards = [one.batch(step) for step in range(60)]
    backwards = [two.batch(step) for step in reversed(range(60))][::-1]
    assert forwards == backwards
    assert make_order(seed=1).batch(0) != forwards[0]
    assert make_order().batch(37) == forwards[37]


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    refs = [place(ref) for ref in make_order(seed=5).batch(1_000_000)]
    assert refs == [(3, 0), (9, 5), (6, 5), (11, 8), (9, 8), (8, 8)]


@pytest.mark.parametrize("shares", [(1, 1), (1, 2, 3), (7, 1, 1, 1), (0.1, 0.25, 0.65), (5,)])
def test_shares_are_exact_after_every_whole_cycle_and_close_within(shares: tuple[float, ...]) -> None:
    exact = [Fraction(str(share)) / sum(Fraction(str(s)) for s in shares) for share in shares]
    mix, counts, cycle = Mix(exact), [0] * len(shares), 20 * 3
    for number in range(4 * cycle):
        item, before = mix.draw(number)
        assert before == counts[item]
        counts[item] += 1
        for count, share in zip(counts, exact, strict=True):
            assert abs(count - (number + 1) * share) < 2
    for count, share in zip(counts, exact, strict=True):
        assert count == 4 * cycle * share


def test_a_pass_takes_every_sample_once_and_no_two_passes_are_alike() -> None:
    shards = [ShardRange(number, 3 + number % 4, LARGE) for number in range(11)]
    total, passes = sum(shard.samples for shard in shards), []
    order = _Passes(shards, key=(0,), group_shards=3, in_written_order=False)
    for number in range(3):
        taken = [order.locate(number * total + offset) for offset in range(total)]
        assert sorted(taken) == [(shard.shard, index) for shard in shards for index in range(shard.samples)]
        passes.append(taken)
    assert passes[0] != passes[1] != passes[2]


def test_few_shards_are_read_at_a_time() -> None:
    order = _Passes([ShardRange(n, 50, LARGE) for n in range(20)], key=(0,), group_shards=4, in_written_order=False)
    for group in range(5):
        assert len({order.locate(200 * group + offset)[0] for offset in range(200)}) == 4


def test_the_first_pass_of_a_growing_set_follows_the_written_order() -> None:
    order = _Passes([ShardRange(n, 8, LARGE) for n in range(6)], key=(0,), group_shards=4, in_written_order=True)
    first = [order.locate(offset) for offset in range(48)]
    assert [shard for shard, _ in first] == [n for n in range(6) for _ in range(8)]
    assert [index for _, index in first[:8]] != list(range(8))
    assert [order.locate(48 + offset)[0] for offset in range(48)] != [shard for shard, _ in first]


def test_batches_have_one_shape_and_subsets_their_weights() -> None:
    order = make_order(batch_size={LARGE: 4, SMALL: 12}, weights=(1.0, 3.0))
    shapes: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for step in range(2700):
        refs = order.batch(step)
        bucket = order.bucket(step)
        assert {ref.bucket for ref in refs} == {bucket}
        assert len(refs) == {LARGE: 4, SMALL: 12}[bucket]
        assert [ref.slot for ref in refs] == list(range(len(refs)))
        shapes[bucket] += len(refs)
        sources.update(ref.source for ref in refs)
    # sounds: a third of its clips is small, and it makes 3/4 of what is drawn
    assert shapes[SMALL] / shapes.total() == pytest.approx(0.25, abs=0.01)
    assert sources["sounds"] / sources.total() == pytest.approx(0.75, abs=0.01)


def test_each_slot_meets_each_subset() -> None:
    order = make_order(weights=(1.0, 1.0))
    seen = {(ref.slot, ref.source) for step in range(40) for ref in order.batch(step)}
    assert len(seen) == 6 * 2


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (2, 1), (1, 3), (3, 2), (2, 3), (6, 1)])
def test_the_global_batch_is_the_same_for_any_devices_and_accumulation(devices: int, accumulate: int) -> None:
    refs = make_order().batch(11)
    parts = [
        clips_of_device(refs, micro_step=micro_step, accumulate=accumulate, rank=rank, devices=devices)
        for micro_step in range(accumulate)
        for rank in range(devices)
    ]
    assert {len(part) for part in parts} == {6 // (devices * accumulate)}
    assert sorted((ref for part in parts for ref in part), key=lambda ref: ref.slot) == refs


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_sizes() -> None:
    check_batch_size({LARGE: 12}, devices=2, accumulate=3)
    with pytest.raises(ValueError, match=r"data\.batch_size=10.*train\.devices=2.*train\.accumulate=2.*8 or 12"):
        check_batch_size({LARGE: 10}, devices=2, accumulate=2)
    with pytest.raises(ValueError, match=r"nearest sizes are 4$"):
        check_batch_size({LARGE: 2}, devices=2, accumulate=2)


def test_a_damaged_slot_takes_the_next_position_of_its_source_and_shape() -> None:
    order = make_order()
    ref = order.batch(3)[2]
    following = order.after(ref)
    assert (following.source, following.bucket, following.slot) == (ref.source, ref.bucket, ref.slot)
    assert following.position == ref.position + 1
    assert following == make_order().after(ref)


def test_resuming_late_does_no_work_for_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    import data.order

    permuted, permutation = [], data.order._permutation

    def counting(length: int, *key: int) -> np.ndarray:
        permuted.append(length)
        return permutation(length, *key)

    monkeypatch.setattr(data.order, "_permutation", counting)
    source = Source("faces", 1.0, tuple(ShardRange(number, 256, LARGE) for number in range(400)))
    Order([source], batch_size=8, seed=0).batch(10**9 + 7)
    assert sum(permuted) <= 400 + 2 * 4 * 256 + 8


@pytest.mark.parametrize(
    ("weights", "batch_size", "message"),
    [
        ((-1.0, 1.0), 4, r"data\.subsets\.faces=-1\.0"),
        ((float("nan"), 1.0), 4, r"data\.subsets\.faces=nan"),
        ((0.0, 0.0), 4, "every weight is 0"),
        ((1.0, 1.0), {LARGE: 4}, r"add data\.batch_size\.13x32x32"),
        ((1.0, 1.0), 0, r"data\.batch_size=0"),
    ],
)
def test_impossible_settings_are_named(weights: tuple[float, float], batch_size, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_order(weights=weights, batch_size=batch_size)


def test_a_weighted_subset_without_clips_is_named() -> None:
    with pytest.raises(ValueError, match=r"data\.subsets\.moods=1\.0: no training clips"):
        Order([*two_sources(), Source("moods", 1.0, ())], batch_size=4, seed=0)
