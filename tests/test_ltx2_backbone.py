import pytest
import torch

from avlit.models.ltx2_backbone import LatentGrid, audio_coords, build_ltx2, video_coords
from avlit.models.sizes import LTX2Config

TINY = LTX2Config(num_layers=1, num_heads=2, video_head_dim=12, audio_head_dim=8, text_dim=20)
GRID = LatentGrid(fps=24.0)
EMBEDDED = LatentGrid(fps=12.0, temporal_factor=4, spatial_factor=8, audio_rate=62.5, audio_factor=1)
T, L, P = 3, 9, 4


@pytest.mark.parametrize("fps", [24.0, 25.0, 29.97])
@pytest.mark.parametrize("frames", [1, 7])
def test_positions_at_ltx2s_own_factors_are_the_stock_ones_bit_for_bit(frames, fps):
    backbone = build_ltx2(TINY)
    found = video_coords(frames, 3, 5, grid=LatentGrid(fps=fps), device="cpu")
    assert torch.equal(found.expand(2, -1, -1, -1), backbone.rope.prepare_video_coords(2, frames, 3, 5, "cpu", fps=fps))
    found = audio_coords(200, grid=LatentGrid(fps=fps), device="cpu")
    assert torch.equal(found.expand(2, -1, -1, -1), backbone.audio_rope.prepare_audio_coords(2, 200, "cpu"))


def test_positions_at_other_factors_are_seconds_and_pixels_of_what_a_latent_holds():
    coords = video_coords(3, 2, 2, grid=EMBEDDED, device="cpu")[0]  # [3, 12, 2]
    torch.testing.assert_close(coords[0, ::4], torch.tensor([[0.0, 1.0], [1.0, 5.0], [5.0, 9.0]]) / 12)
    assert coords[1:, :4].tolist() == [[[0, 8], [0, 8], [8, 16], [8, 16]], [[0, 8], [8, 16], [0, 8], [8, 16]]]
    times = audio_coords(3, grid=EMBEDDED, device="cpu")[0, 0]
    torch.testing.assert_close(times, torch.tensor([[0, 0.016], [0.016, 0.032], [0.032, 0.048]]))


@pytest.mark.parametrize("grid", [GRID, EMBEDDED], ids=["LTX-2", "embedded"])
def test_references_end_where_the_clip_begins_and_leave_its_times_alone(grid):
    video = video_coords(1 + T, 2, 2, grid=grid, num_references=1, device="cpu")
    assert torch.equal(video[:, :, 4:], video_coords(T, 2, 2, grid=grid, device="cpu"))
    assert torch.equal(video[:, 1:, :4], video[:, 1:, 4:8])
    torch.testing.assert_close(video[0, 0, 0], torch.tensor([-1 / grid.fps, 0.0]))
    audio = audio_coords(P + L, grid=grid, num_references=P, device="cpu")
    assert torch.equal(audio[:, :, P:], audio_coords(L, grid=grid, device="cpu"))
    torch.testing.assert_close(audio[0, 0, :P, 0], torch.tensor([-4.0, -3.0, -2.0, -1.0]) / grid.audio_rate)
    torch.testing.assert_close(audio[0, 0, :P, 1], torch.tensor([-3.0, -2.0, -1.0, 0.0]) / grid.audio_rate)
