"""The judges of the embedded corpus: trained on clips that no model trains on and none is sampled for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from avlit.codecs.embedded_audio import EmbeddedAudioCodec
from avlit.codecs.embedded_video import EmbeddedVideoCodec
from avlit.metrics.picture_judge import PictureJudge
from avlit.metrics.word_judge import SpokenWord, WordJudge
from data.clip import RawClip
from data.corpus import CorpusSettings, depth_frames, make_clip
from data.corpus.persons import HAIR_COLOURS, SKINS
from data.corpus.voice import VOCABULARY

FIRST, NUM_CLIPS = 500_000, 320
"""Clips that train the judge of words; those after them are heard by nobody."""

NUM_PICTURES = 640
"""Clips of each of PICTURED whose first frames train the judge of pictures."""

PICTURED = ("basic_face", "single_character")

ATTRIBUTES = {"skin": tuple(SKINS), "hair_colour": tuple(HAIR_COLOURS)}
"""What every reference image shows of a person. Clothes and hair that is tied up are at its edge or beyond."""

DAMAGE = 0.25
"""Most noise on the latents of a picture that the judge learns from, where the codec's channels have about 1."""


def corpus_judge(*, seed: int = 0, epochs: int = 6) -> WordJudge:
    """A judge of the words of clips with one speaker, as they are and as the embedded codec gives them back."""
    clips = corpus_speech(range(FIRST, FIRST + NUM_CLIPS), CorpusSettings())
    raw = torch.from_numpy(np.stack([clip.speech for clip in clips]))  # [B, N]
    codec = EmbeddedAudioCodec()
    decoded = torch.cat([codec.decode(codec.encode(part))[:, : raw.shape[1]] for part in raw.split(64)])
    words = [spoken_words(clip) for clip in clips]
    return WordJudge.train(
        torch.cat([raw, decoded]), [*words, *words], vocabulary=tuple(VOCABULARY), seed=seed, epochs=epochs
    )


def corpus_speech(numbers: Sequence[int], settings: CorpusSettings) -> list[RawClip]:
    """Clips of the corpus with one speaker, without picture."""
    return [make_clip("basic_face", n, settings, has_frames=False, has_references=False) for n in numbers]


def spoken_words(clip: RawClip) -> list[SpokenWord]:
    """What is said in a clip of the corpus, and when."""
    words = clip.truth["words"]
    assert isinstance(words, list)
    return [SpokenWord(word["word"], word["start_s"], word["end_s"]) for word in words]


def corpus_picture_judge(*, seed: int = 0, num_clips: int = NUM_PICTURES, epochs: int = 6) -> PictureJudge:
    """A judge of pictures of one person, most of which it learns through the embedded codec, with noise on latents."""
    pictures, depths, persons = corpus_pictures(range(FIRST, FIRST + num_clips))
    return PictureJudge.train(pictures, depths, persons, attributes=ATTRIBUTES, vary=damaged, seed=seed, epochs=epochs)


def corpus_pictures(numbers: Sequence[int]) -> tuple[Tensor, Tensor, list[dict[str, str]]]:
    """First frames [B, 3, 64, 64] in [-1, 1] of clips with one person, their depths [B, 64, 64], and who is seen."""
    settings = CorpusSettings(num_frames=1)
    pictures, depths, persons = [], [], []
    for subset in PICTURED:
        for number in numbers:
            clip = make_clip(subset, number, settings, has_references=False)
            assert clip.frames is not None
            pictures.append(clip.frames[0])
            depths.append(depth_frames(subset, number, settings)[0])
            persons.append(person_of(clip.truth))
    shown = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    return shown, torch.from_numpy(np.stack(depths)), persons


def person_of(truth: dict[str, object]) -> dict[str, str]:
    """The attributes of a clip's only person."""
    persons = truth["identity"]
    assert isinstance(persons, list) and len(persons) == 1
    return {name: persons[0][name] for name in ATTRIBUTES}


def damaged(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] through the codec, with noise of a random strength; a quarter stays as it is."""
    codec = EmbeddedVideoCodec()
    latents = codec.encode(pictures[:, :, None])  # [B, C, 1, h, w]
    strength = DAMAGE * torch.rand(len(pictures), 1, 1, 1, 1, generator=generator)
    noisy = latents + strength * torch.randn(latents.shape, generator=generator)
    returned = codec.decode(noisy)[:, :, 0].clamp(-1, 1)
    return torch.where(torch.rand(len(pictures), 1, 1, 1, generator=generator) < 0.25, pictures, returned)
