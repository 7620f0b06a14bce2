"""The judges of the embedded corpus: trained on clips that no model trains on and none is sampled for.

A machine trains each once and keeps it: what it becomes follows from sources and torch, by which its file is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from avlit.adapters import fingerprint_of
from avlit.codecs.embedded_audio import EmbeddedAudioCodec
from avlit.codecs.embedded_video import EmbeddedVideoCodec
from avlit.durable import write_atomically
from avlit.metrics import picture_judge, word_judge
from avlit.metrics.picture_judge import PictureJudge, Seer
from avlit.metrics.word_judge import Listener, SpokenWord, WordJudge
from data.clip import RawClip
from data.corpus import CorpusSettings, depth_frames, make_clip
from data.corpus.persons import HAIR_COLOURS, SKINS
from data.corpus.voice import VOCABULARY
from data.embedded import source_hash

T = TypeVar("T", bound=nn.Module)

FIRST, NUM_CLIPS = 500_000, 320
"""Clips that train the judge of words; those after them are heard by nobody."""

NUM_PICTURES = 640
"""Clips of each of PICTURED whose first frames train the judge of pictures."""

PICTURED = ("basic_face", "single_character")

ATTRIBUTES = {"skin": tuple(SKINS), "hair_colour": tuple(HAIR_COLOURS)}
"""What every reference image shows of a person. Clothes and hair that is tied up are at its edge or beyond."""

DAMAGE = 0.25
"""Most noise on the latents of a picture that the judge learns from, where the codec's channels have about 1."""


def kept_word_judge(cache_dir: Path) -> WordJudge:
    """`corpus_judge()`, read from `cache_dir` where it was trained before."""
    vocabulary = tuple(VOCABULARY)
    network = _kept(cache_dir, "words", Listener(1 + len(vocabulary)), lambda: corpus_judge().listener)
    return WordJudge(network, vocabulary)


def kept_picture_judge(cache_dir: Path) -> PictureJudge:
    """`corpus_picture_judge()`, read from `cache_dir` where it was trained before."""
    network = _kept(cache_dir, "pictures", Seer(ATTRIBUTES), lambda: corpus_picture_judge().seer)
    return PictureJudge(network, ATTRIBUTES)


def _kept(cache_dir: Path, of: str, network: T, train: Callable[[], T]) -> T:
    """The network with the weights of its file, if they are those that were written; else a trained one, written."""
    path = cache_dir / "judges" / f"{of}-{_source_of_judges()}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            written = (file.metadata() or {}).get("fingerprint")
        if fingerprint_of("", tensors, names=tensors) == written:
            network.load_state_dict(tensors)
            return network.eval()
        print(f"{path}: is not what was written; the judge is trained again", flush=True)
    except FileNotFoundError:
        print(f"Trains the judge of {of}, and keeps it in {path.parent}", flush=True)
    except SafetensorError as error:
        print(f"{path}: cannot be read ({error}); the judge is trained again", flush=True)
    trained = train()
    tensors = trained.state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(tensors, {"fingerprint": fingerprint_of("", tensors, names=tensors)}))
    return trained


def _source_of_judges() -> str:
    """A hash of the code that decides what the judges are, corpus and codecs included."""
    digest = hashlib.sha256(f"{source_hash()} {torch.__version__}".encode())
    for path in sorted((__file__, picture_judge.__file__, word_judge.__file__)):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:12]


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
