"""Latents of grey video and silence: the codec's own, of any length, and without a trace of their end."""

from pathlib import Path

import pytest
import torch

from avlit.codecs.blank import grey_latents, silence_latents
from avlit.codecs.build import build_audio_codec, build_video_codec
from avlit.models.control_unit import control_unit


def test_grey_is_what_the_codec_makes_of_zeros_and_comes_back_grey() -> None:
    codec = build_video_codec("embedded")
    grey = grey_latents(codec, num_frames=9, height=32, width=48)
    assert grey.shape == (1, codec.channels, 3, 4, 6)
    torch.testing.assert_close(codec.decode(grey), torch.zeros(1, 3, 9, 32, 48), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["embedded", "mmaudio"])
def test_silence_has_the_asked_length(name: str, mmaudio_folder: Path) -> None:
    codec = build_audio_codec(name, mmaudio_folder if name == "mmaudio" else None)
    for length in (1, 7, 40):
        silence = silence_latents(codec, length)
        assert silence.shape == (1, length, codec.channels) and silence.isfinite().all()
    with pytest.raises(ValueError, match="num_latents=0"):
        silence_latents(codec, 0)


def test_short_silence_begins_as_longer_silence_does() -> None:
    codec = build_audio_codec("embedded")
    torch.testing.assert_close(silence_latents(codec, 40)[:, :7], silence_latents(codec, 7))


def test_they_are_what_the_control_unit_fills_with() -> None:
    video, audio = build_video_codec("embedded"), build_audio_codec("embedded")
    empty = grey_latents(video, num_frames=9, height=32, width=32)
    control = control_unit(
        empty=empty, silence=silence_latents(audio, 5 + 20), voice=torch.ones(3, 5, audio.channels),
        has_voice=torch.tensor([True, False, True]),
    )  # fmt: skip
    assert control.visual.shape == (3, video.channels + 1, 3, 4, 4)
    torch.testing.assert_close(control.visual[1, :-1], empty[0])
