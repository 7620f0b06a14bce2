import pytest
import torch
from torch import Tensor

from avlit.models.control_unit import control_unit

B, T, HEIGHT, WIDTH, L, P = 2, 3, 2, 4, 9, 4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_control_unit_is_reference_then_structure_and_voice_then_silence():
    image, structure, voice = (
        noise(B, 8, 1, HEIGHT, WIDTH), noise(B, 8, T, HEIGHT, WIDTH, seed=1), noise(B, P, 6)
    )  # fmt: skip
    silence = noise(1, P + L, 6, seed=2)
    unit = control_unit(
        empty=torch.zeros_like(structure), silence=silence, image=image, structure=structure, voice=voice
    )
    assert torch.equal(unit.visual[:, :-1], torch.cat((image, structure), 2))
    assert torch.equal(unit.acoustic[..., :-1], torch.cat((voice, silence[:, P:].expand(B, -1, -1)), 1))
    assert unit.visual[:, -1].mean((2, 3)).tolist() == [[0, 1, 1, 1]] * B
    assert unit.acoustic[..., -1].tolist() == [[0] * P + [1] * L] * B
    assert (unit.num_images, unit.num_voice_latents) == (1, P)
    assert torch.equal(unit.images, image)
    assert torch.equal(unit.voices, voice)


def test_clips_of_different_tasks_are_one_tensor_and_what_a_clip_lacks_is_never_read():
    has = torch.tensor([True, False])
    empty, silence = noise(1, 8, T, HEIGHT, WIDTH), noise(1, P + L, 6)
    given = {
        "image": noise(B, 8, 1, HEIGHT, WIDTH, seed=6),
        "structure": noise(B, 8, T, HEIGHT, WIDTH),
        "voice": noise(B, P, 6),
    }
    for value in given.values():
        value[1] = torch.nan
    flags = {f"has_{name}": has for name in given}
    unit = control_unit(empty=empty, silence=silence, **given, **flags)
    assert torch.equal(unit.visual[1, :-1], torch.cat((empty[0, :, :1], empty[0]), 1))
    assert torch.equal(unit.acoustic[1, :, :-1], silence[0])
    assert unit.visual[1, -1].eq(1).all()
    assert unit.acoustic[1, :, -1].eq(1).all()
    alone = control_unit(empty=empty, silence=silence, **{name: value[:1] for name, value in given.items()})
    assert torch.equal(unit.visual[:1], alone.visual)
    assert torch.equal(unit.acoustic[:1], alone.acoustic)


def test_without_a_reference_nothing_leads_a_stream():
    unit = control_unit(
        empty=torch.zeros(1, 8, T, HEIGHT, WIDTH), silence=torch.zeros(1, L, 6), structure=noise(B, 8, T, HEIGHT, WIDTH)
    )
    assert unit.visual.shape == (B, 9, T, HEIGHT, WIDTH)
    assert unit.acoustic.shape == (B, L, 7)
    assert (unit.num_images, unit.num_voice_latents) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": None}, "image, structure and voice are all None: leave the control out"),
        ({"has_image": torch.tensor([True, True])}, "has_image without image: give both or neither"),
        ({"structure": torch.zeros(2, 8, 2, 2, 4)}, r"structure has shape \(2, 8, 2, 2, 4\), expected \(2, 8, 3, 2, 4"),
        ({"image": torch.zeros(2, 8, 1, 4, 4)}, r"image has shape \(2, 8, 1, 4, 4\), expected \(2, 8, 1, 2, 4"),
        ({"voice": torch.zeros(2, 9, 6)}, "silence must be as long as voice and clip together"),
        ({"voice": torch.zeros(2, 4, 5)}, "with as many channels"),
        ({"voice": torch.zeros(3, 4, 6)}, r"voice has shape \(3, 4, 6\) for 2 clips"),
    ],
)
def test_controls_that_do_not_fit_together_are_refused(changes, message):
    given = {
        "empty": torch.zeros(1, 8, T, HEIGHT, WIDTH), "silence": torch.zeros(1, L, 6),
        "structure": torch.zeros(B, 8, T, HEIGHT, WIDTH),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        control_unit(**{**given, **changes})
