"""Random numbers depend on (seed, step, slot, name) and on nothing else."""

import numpy as np
import torch

from avlit.randomness import Draws


def test_noise_of_a_clip_is_the_same_however_the_global_batch_is_divided():
    whole = Draws(seed=3, step=11, slots=range(8)).normal("noise", torch.zeros(8, 2, 5))
    halves = [
        Draws(seed=3, step=11, slots=s).normal("noise", torch.zeros(4, 2, 5)) for s in ((0, 2, 4, 6), (1, 3, 5, 7))
    ]
    assert torch.equal(whole[0::2], halves[0])
    assert torch.equal(whole[1::2], halves[1])


def test_seed_step_slot_and_name_each_change_the_numbers():
    like = torch.zeros(1, 64)
    base = Draws(seed=3, step=11, slots=[0]).normal("noise", like)
    others = [
        Draws(seed=4, step=11, slots=[0]).normal("noise", like),
        Draws(seed=3, step=12, slots=[0]).normal("noise", like),
        Draws(seed=3, step=11, slots=[1]).normal("noise", like),
        Draws(seed=3, step=11, slots=[0]).normal("other", like),
    ]
    assert all(not torch.equal(base, other) for other in others)


def test_noise_is_standard_normal_and_uncorrelated_between_clips():
    noise = Draws(seed=0, step=0, slots=range(4)).normal("noise", torch.zeros(4, 20000))
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    off_diagonal = torch.corrcoef(noise) - torch.eye(4)
    assert off_diagonal.abs().max() < 0.03


def test_conditions_are_dropped_at_the_configured_rate_in_training_and_never_when_measuring():
    slots = range(4000)
    assert abs(Draws(1, 5, slots).happens("drop", 0.1).mean() - 0.1) < 0.02
    assert not Draws(1, 5, slots, is_training=False).happens("drop", 0.1).any()


def test_heldout_noise_levels_are_even_and_do_not_depend_on_the_step():
    first, second = (Draws(1, step, range(64), is_training=False) for step in (0, 900))
    assert np.array_equal(first.times(), second.times())
    assert torch.equal(first.normal("noise", torch.zeros(64, 3)), second.normal("noise", torch.zeros(64, 3)))
    counts, _ = np.histogram(first.times(), bins=8, range=(0, 1))
    assert counts.min() >= 7 and counts.max() <= 9
