"""From the names in a config to codecs: the only place that knows which there are."""

from pathlib import Path

import torch

from avlit.codecs import AudioCodec, TextEncoder, TrackEncoder, VideoCodec
from avlit.codecs.embedded_audio import EmbeddedAudioCodec, EmbeddedTrackEncoder
from avlit.codecs.embedded_text import EmbeddedTextEncoder
from avlit.codecs.embedded_video import EmbeddedVideoCodec
from avlit.codecs.gemma import GemmaEncoder
from avlit.codecs.ltx2_audio import LTX2AudioCodec
from avlit.codecs.ltx2_video import LTX2VideoCodec
from avlit.codecs.mmaudio import MMAudioCodec
from avlit.codecs.pretrained import CogVideoXCodec, T5Encoder, Wav2Vec2Encoder
from avlit.codecs.wan import UMT5Encoder, WanCodec
from avlit.errors import UserError
from avlit.timing import VIDEO_FACTORS

VIDEO_CODECS = ("embedded", "cogvideox", "wan2.1", "wan2.2", "ltx2")
TRACK_ENCODERS = ("embedded", "wav2vec2")
TEXT_ENCODERS = ("embedded", "t5", "umt5", "gemma")
AUDIO_CODECS = ("embedded", "mmaudio", "ltx2")


def build_video_codec(
    name: str, folder: Path | str | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> VideoCodec:
    """`embedded`, or `cogvideox`, `wan2.1`, `wan2.2` or `ltx2` from a diffusers `folder` with `vae/`.

    device and dtype place its weights. UserError: the folder's VAE divides time or space by other factors.
    """
    if name == "embedded":
        return EmbeddedVideoCodec()
    if name == "cogvideox":
        return CogVideoXCodec(_folder("video", name, folder), device=device, dtype=dtype)
    if name in ("wan2.1", "wan2.2", "ltx2"):
        released = LTX2VideoCodec if name == "ltx2" else WanCodec
        codec = released(_folder("video", name, folder), device=device, dtype=dtype)
        if (codec.temporal_factor, codec.spatial_factor) != VIDEO_FACTORS[name]:
            raise UserError(
                f"codecs.video={name}: the VAE in {folder} divides space by {codec.spatial_factor}, that of {name} by "
                f"{VIDEO_FACTORS[name][1]} (time by {codec.temporal_factor} and {VIDEO_FACTORS[name][0]}); give "
                f"codecs.video_weights={name}'s folder, or the other codecs.video"
            )
        return codec
    raise _unknown("codecs.video", name, VIDEO_CODECS)


def build_track_encoder(name: str, folder: Path | str | None = None, *, device: str = "cpu") -> TrackEncoder:
    """`embedded`, or `wav2vec2` from a transformers `folder` of a wav2vec2 base model."""
    if name == "embedded":
        return EmbeddedTrackEncoder()
    if name == "wav2vec2":
        return Wav2Vec2Encoder(_folder("tracks", name, folder), device=device)
    raise _unknown("codecs.tracks", name, TRACK_ENCODERS)


def build_text_encoder(
    name: str, folder: Path | str | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """`embedded`, or `t5`, `umt5` or `gemma` from a diffusers `folder` with `text_encoder/` and `tokenizer/`.

    `gemma` also reads its `connectors/`.
    """
    if name == "embedded":
        return EmbeddedTextEncoder()
    if name == "t5":
        return T5Encoder(_folder("text", name, folder), device=device, dtype=dtype)
    if name == "umt5":
        return UMT5Encoder(_folder("text", name, folder), device=device, dtype=dtype)
    if name == "gemma":
        return GemmaEncoder(_folder("text", name, folder), device=device, dtype=dtype)
    raise _unknown("codecs.text", name, TEXT_ENCODERS)


def build_audio_codec(name: str, folder: Path | str | None = None, *, device: str = "cpu") -> AudioCodec:
    """`embedded`, or `mmaudio` or `ltx2` from a diffusers `folder` with `audio_vae/` and `vocoder/`."""
    if name == "embedded":
        return EmbeddedAudioCodec()
    if name == "mmaudio":
        return MMAudioCodec(_folder("audio", name, folder), device=device)
    if name == "ltx2":
        return LTX2AudioCodec(_folder("audio", name, folder), device=device)
    raise _unknown("codecs.audio", name, AUDIO_CODECS)


def _folder(kind: str, name: str, folder: Path | str | None) -> Path:
    if folder is None or str(folder) == "":
        raise UserError(f"codecs.{kind}={name} needs its released weights: codecs.{kind}_weights=FOLDER")
    return Path(folder)


def _unknown(key: str, name: str, allowed: tuple[str, ...]) -> UserError:
    return UserError(f"{key}={name}: there is no such codec; choose one of {', '.join(allowed)}")
