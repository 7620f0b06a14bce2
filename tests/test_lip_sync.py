"""The lip-sync metric moves as it must when the truth is shifted, swapped or destroyed."""

import numpy as np
import pytest
import torch

from avlit.metrics.lip_sync import lip_sync, mouth_aperture, speech_envelope, sync_correlation


def curves(count: int = 6, frames: int = 48) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((count, frames + 4))
    return np.stack([noise[:, i : i + frames] for i in range(4)]).mean(0)


def test_sync_is_one_for_the_truth_and_falls_when_it_is_shifted_swapped_or_destroyed():
    truth = curves()
    own, shuffled = lip_sync(truth, truth)
    assert own == pytest.approx(1.0)
    assert abs(shuffled) < 0.25
    shifted, _ = lip_sync(np.roll(truth, 6, axis=1), truth)
    assert shifted < 0.5
    swapped, _ = lip_sync(np.roll(truth, 1, axis=0), truth)
    assert abs(swapped) < 0.25
    destroyed, _ = lip_sync(np.random.default_rng(1).standard_normal(truth.shape), truth)
    assert abs(destroyed) < 0.25


def test_a_still_mouth_scores_zero():
    assert sync_correlation(np.ones(20), curves(1, 20)[0]) == 0.0


def test_one_clip_cannot_be_compared_with_shuffled_speech():
    with pytest.raises(ValueError, match="two or more"):
        lip_sync(curves(1), curves(1))


def test_aperture_is_the_dark_share_of_the_mouth_box():
    video = torch.ones(1, 3, 2, 16, 16)
    video[:, :, 1, 4:8, 4:8] = -1.0  # 16 dark pixels in the second frame
    boxes = torch.tensor([[[2.0, 2, 10, 10], [2, 2, 10, 10]]])
    aperture = mouth_aperture(video, boxes)
    assert aperture[0, 0] < 0.01
    assert aperture[0, 1] == pytest.approx(16 / 64, abs=0.01)


def test_darkness_outside_the_box_does_not_count():
    video = torch.ones(1, 3, 1, 16, 16)
    video[..., :2, :] = -1.0
    assert mouth_aperture(video, torch.tensor([[[2.0, 4, 10, 10]]])).max() < 0.01


def test_envelope_is_the_root_mean_square_of_each_frame():
    waveform = np.concatenate([np.zeros(100), 0.5 * np.ones(100)])
    assert speech_envelope(waveform, num_frames=2) == pytest.approx([0.0, 0.5], abs=1e-5)
