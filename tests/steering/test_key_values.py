"""The cache in slots: what is read is what was written, through growing, moving and beginning again."""

import pytest
import torch

from lockin_fast.steering.key_values import KeyValues, Reached, masks

HEADS, DIM = 2, 3


def states(rows, tokens, seed=0):
    return torch.randn(2, rows, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def written(cache, slots, start, length, value, layer=0, **options):
    return cache.write_next(slots, start, length, **options).update(*value, layer)


def test_a_forward_reads_what_it_and_earlier_ones_wrote():
    cache, first, second = KeyValues(8, 100), states(2, 3), states(2, 1, seed=1)
    written(cache, slice(0, 2), 0, 3, first)
    keys, values = written(cache, slice(0, 2), 3, 4, second)
    assert torch.equal(keys, torch.cat([first[0], second[0]], 2))
    assert torch.equal(values, torch.cat([first[1], second[1]], 2))


def test_rows_write_at_positions_of_their_own():
    cache, first, second = KeyValues(2, 10), states(2, 3), states(2, 1, seed=1)
    written(cache, slice(0, 2), 0, 3, first)
    keys, _ = written(cache, slice(0, 2), torch.tensor([1, 3]), 4, second)
    assert torch.equal(keys[0], torch.stack([first[0, 0, :, 0], second[0, 0, :, 0], first[0, 0, :, 2],
                                             torch.zeros(HEADS, DIM)], 1))  # fmt: skip
    assert torch.equal(keys[1], torch.cat([first[0, 1], second[0, 1]], 1))


@pytest.mark.parametrize("steps", [1, 7, 90])
def test_growing_keeps_what_is_there_and_stays_within_the_bounds(steps):
    cache, values = KeyValues(5, 100), []
    for step in range(steps):
        rows = min(1 + step, 5)
        values.append(states(rows, 1, seed=step))
        keys, _ = written(cache, slice(0, rows), step, step + 1, values[-1])
    expected = [value[0, 0, :, 0] if len(value[0]) else None for value in values]
    assert torch.equal(keys[0], torch.stack(expected, 1))
    held = cache._keys[0]
    assert held.shape[0] <= 5 and held.shape[2] <= 100
    assert not held[:, :, steps:].any()


@pytest.mark.parametrize("sources", [[0, 1, 2], [2, 0], [1, 1, 1, 0, 2], [], [2, 1, 0]])
def test_rearranged_slots_go_on_from_their_sources(sources):
    cache, value = KeyValues(8, 10), states(3, 4)
    written(cache, slice(0, 3), 0, 4, value)
    cache.rearrange(sources)
    keys, values = written(cache, slice(0, len(sources)), 4, 5, states(len(sources), 1, seed=1))
    assert torch.equal(keys[:, :, :4], value[0][sources]) and torch.equal(values[:, :, :4], value[1][sources])


def test_what_begins_in_a_used_slot_finds_nothing_of_the_former_one():
    cache, other, value = KeyValues(2, 10), KeyValues(3, 4), states(3, 2, seed=2)
    written(cache, slice(0, 2), 0, 6, torch.full((2, 2, HEADS, 6, DIM), torch.nan))
    written(other, slice(0, 3), 0, 2, value)
    cache.begin(slice(1, 2), other, torch.tensor([2]), 2)
    keys, values = written(cache, slice(1, 2), 2, 6, states(1, 1))
    assert torch.equal(keys[0, :, :2], value[0, 2]) and torch.equal(values[0, :, :2], value[1, 2])
    assert not keys[0, :, 3:].any() and not values[0, :, 3:].any()


def test_the_last_wanted_layer_ends_the_forward_and_has_written():
    cache, value = KeyValues(2, 4), states(2, 2)
    cache.write_next(slice(0, 2), 0, 2, stop_at=1).update(*value, 0)
    with pytest.raises(Reached):
        cache.update(*value, 1)
    keys, _ = written(cache, slice(0, 2), 2, 3, states(2, 1), layer=1)
    assert torch.equal(keys[:, :, :2], value[0])


def test_masks_tell_what_a_position_may_read():
    positions = torch.tensor([[4], [1]])
    full = masks(["full_attention"], None, positions, 6, None)
    assert full.int()[:, 0, 0].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    both = masks(["full_attention", "sliding_attention"], 2, positions, 6, torch.float32)
    assert torch.equal(both["full_attention"] == 0, full) and torch.equal(both["full_attention"] == -torch.inf, ~full)
    assert (both["sliding_attention"] == 0).int()[:, 0, 0].tolist() == [[0, 0, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    run = masks(["sliding_attention"], 2, torch.tensor([[1, 2]]), 3, None)
    assert run.int()[0, 0].tolist() == [[1, 1, 0], [0, 1, 1]]
