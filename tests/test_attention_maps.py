from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from avlit.models.aligned_rope import aligned_rotary
from avlit.models.attention_maps import AttentionMaps, attention_maps, draw_attention
from avlit.models.backbones import wan_rotary
from avlit.models.mmdit_branch import BranchText
from avlit.models.sizes import TwinMMDiTConfig, TwinWanConfig
from avlit.models.twin_mmdit import TwinMMDiT
from avlit.models.twin_wan import TwinWan

TINY = TwinWanConfig(
    num_layers=3, num_heads=2, head_dim=24, ffn_dim=64, freq_dim=16, text_dim=20, max_text_tokens=10,
    max_reference_tokens=6, video_channels=8, audio_channels=5, audio_kernel=3,
)  # fmt: skip
N, L = 18, 11  # video and audio tokens


def model_and_inputs() -> tuple[TwinWan, dict[str, Any]]:
    model, random = TwinWan(TINY), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is zero any more
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    return model, {
        "video_latents": torch.randn(2, 8, 3, 4, 6, generator=random),
        "audio_latents": torch.randn(2, L, 5, generator=random),
        "text": torch.randn(2, 10, 20, generator=random),
        "reference": torch.randn(2, 6, 5, generator=random),
        "video_timestep": torch.tensor([300.0, 700.0]),
        "audio_timestep": torch.tensor([100.0, 900.0]),
    }


def turned(normed: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """[B, tokens, D] -> rotated heads [B, heads, tokens, head] in float64, by complex numbers."""
    pairs = torch.view_as_complex(normed.double().unflatten(-1, (2, 12, 2)))
    angles = torch.complex(rotary[0][:, ::2].double(), rotary[1][:, ::2].double())
    return torch.view_as_real(pairs * angles[:, None]).flatten(-2).transpose(1, 2)


def test_maps_are_the_softmax_of_the_layers_own_queries_and_keys():
    model, x = model_and_inputs()
    outputs: dict[str, Tensor] = {}
    twins: dict[str, Any] = {"video": model.backbone, "audio": model.audio}
    for stream, twin in twins.items():
        for kind in ("norm_q", "norm_k"):
            getattr(twin.blocks[1].attn1, kind).register_forward_hook(
                lambda _module, _given, out, name=f"{stream} {kind}": outputs.__setitem__(name, out)
            )
    maps = attention_maps(model, **x, layers=[1])
    rotary = {
        "video": wan_rotary(model.backbone, 3, 4, 6, torch.device("cpu")),
        "audio": aligned_rotary(L, num_frames=3, axes=(8, 8, 8)),
    }
    query, key = (
        torch.cat([turned(outputs[f"{stream} {kind}"], rotary[stream]) for stream in twins], dim=2)
        for kind in ("norm_q", "norm_k")
    )
    expected = (query @ key.transpose(-1, -2) / 24**0.5).softmax(-1).mean(1).float()  # [B, N + L, N + L]
    assert maps.layers == (1,)
    assert maps.grid == (3, 2, 3)
    torch.testing.assert_close(maps.video_to_audio[0], expected[:, :N, N:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maps.audio_to_video[0], expected[:, N:, :N], rtol=1e-5, atol=1e-6)
    assert expected[:, :N, N:].std() > 1e-3


def test_looking_changes_nothing():
    model, x = model_and_inputs()
    with torch.no_grad():
        before = model(**x)
        layers: list[int] = []
        watched = model(**x, observe=lambda layer, heads: layers.append(layer))
    assert layers == [0, 1, 2]
    assert torch.equal(before.video, watched.video)
    assert torch.equal(before.audio, watched.audio)
    assert attention_maps(model, **x).layers == (0, 1, 2)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_come_in_the_order_asked_for_and_unknown_ones_are_refused():
    model, x = model_and_inputs()
    all_maps, two = attention_maps(model, **x), attention_maps(model, **x, layers=[2, 0])
    assert torch.equal(two.video_to_audio[0], all_maps.video_to_audio[2])
    assert torch.equal(two.audio_to_video[1], all_maps.audio_to_video[0])
    assert torch.equal(two.saliency(0), all_maps.saliency(0))
    for layer in (3, -1):
        with pytest.raises(ValueError, match=rf"layers=\[{layer}\]: the model has layers 0 to 2"):
            attention_maps(model, **x, layers=[layer])


def looking_at_the_lips() -> AttentionMaps:
    """Two latent frames of 2 x 3 places and four audio tokens: sound looks at place (1, 2), video at its own time."""
    to_video = torch.zeros(1, 4, 12)
    to_video[0, :2, 5] = 0.5
    to_video[0, 2:, 11] = 0.25
    to_audio = torch.zeros(1, 12, 4)
    to_audio[0, :6, :2] = 0.3
    to_audio[0, 6:, 2:] = 0.3
    return AttentionMaps((4,), (to_audio,), (to_video,), (2, 2, 3), (0,))


def test_saliency_is_over_places_and_the_matrix_over_times():
    maps = looking_at_the_lips()
    expected = torch.zeros(1, 2, 2, 3)
    expected[0, 0, 1, 2], expected[0, 1, 1, 2] = 0.25, 0.125
    torch.testing.assert_close(maps.saliency(4), expected)
    torch.testing.assert_close(maps.time_by_time(4)[0], torch.tensor([[0.3, 0.3, 0, 0], [0, 0, 0.3, 0.3]]))


@pytest.mark.parametrize("with_frames", [True, False])
def test_the_picture_is_bright_where_attention_is(tmp_path, with_frames):
    frames = np.full((8, 16, 24, 3), 100, np.uint8) if with_frames else None
    path = tmp_path / "attention.png"
    draw_attention(looking_at_the_lips(), frames, path, duration_s=2.0, columns=2)
    assert [file.name for file in tmp_path.iterdir()] == ["attention.png"]
    pixels = np.asarray(Image.open(path).convert("L")).astype(int)
    frame, places = pixels[24:152], 192  # a frame of 2 x 3 places is 128 x 192 pixels
    for column, at_least in ((0, 150), (1, 60)):  # the second frame has half the attention
        picture = frame[:, column * places : (column + 1) * places]
        assert picture[96, 160] > at_least
        assert picture[96, 160] > picture[32, 32] + 40
    left = 2 * places + 44
    matrix = frame[:, left : left + 256]
    for down, right, is_bright in ((32, 64, True), (32, 192, False), (96, 64, False), (96, 192, True)):
        assert (matrix[down, right] > 200) == is_bright


def test_in_a_twin_mm_dit_rows_are_shared_with_both_texts_and_nobody_looks_at_padding() -> None:
    config = TwinMMDiTConfig(
        num_layers=1, num_single_layers=1, num_heads=2, head_dim=16, num_refiner_layers=1, text_dim=12,
        rope_axes=(4, 6, 6), video_channels=4, image_channels=5, audio_channels=5,
    )  # fmt: skip
    model, random = TwinMMDiT(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    features, times = torch.randn(1, 7, 12, generator=random), torch.full((1,), 500.0)
    x: dict[str, Any] = {
        "video_latents": torch.randn(1, 4, 2, 4, 4, generator=random),
        "audio_latents": torch.randn(1, 6, 5, generator=random),
        "video_timestep": times, "audio_timestep": times, "audio_text": BranchText(features[:, :2]),
    }  # fmt: skip
    maps = attention_maps(model, **x, video_text=BranchText(features, lengths=[3]))
    assert maps.layers == (0, 1) and maps.grid == (2, 2, 2) and maps.num_keys == (8 + 6 + 3 + 2,)
    assert maps.video_to_audio[0].shape == (1, 8, 6) and maps.audio_to_video[1].shape == (1, 6, 8)
    assert (maps.video_to_audio[0].sum(-1) < 1).all()
    cut = attention_maps(model, **x, video_text=BranchText(features[:, :3]))
    torch.testing.assert_close(maps.video_to_audio, cut.video_to_audio)
    torch.testing.assert_close(maps.audio_to_video, cut.audio_to_video)
