"""RawClip to EncodedSample: frames and sound to latents, tracks to features, captions to text, through the codecs."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from avlit.codecs import AudioCodec, TextEncoder, TrackEncoder, VideoCodec
from avlit.sound import gain_to_peak, resample
from data.clip import RawClip
from data.sample import CAPTION, CONTROLS, MAX_REFERENCES, TRACKS, Annotation, EncodedSample
from data.shards import Identity


@dataclass(frozen=True)
class Encoders:
    """What makes a clip's text, latents and track features; None makes none.

    captions: styles of caption that are encoded where a clip has them, besides the one that every clip has.
    controls: those of CONTROLS that are encoded where a clip has them, by the video codec.
    reference_tokens: most latents of a reference sound that are kept, 0 for none. peak: loudest sample that the sound
    of a clip and of a reference is brought to before it is encoded; None leaves it as it is.
    """

    text: TextEncoder
    video: VideoCodec | None = None
    audio: AudioCodec | None = None
    tracks: TrackEncoder | None = None
    captions: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    reference_tokens: int = 0
    peak: float | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.controls) - set(CONTROLS):
            raise ValueError(f"controls={self.controls}: {min(unknown)!r} is none of {', '.join(CONTROLS)}")
        if self.controls and self.video is None:
            raise ValueError(f"controls={self.controls}: they are encoded by the video codec, and there is none")

    def without_picture(self) -> "Encoders":
        """The same for sound without picture."""
        return replace(self, video=None, tracks=None, controls=())

    def identity(self, *, fps: float, rate_hz: int) -> Identity:
        """What a shard set made with these encoders is identified by, and what a run that has them needs of it."""
        made = {"video_codec": self.video, "audio_codec": self.audio, "track_encoder": self.tracks}
        identity: Identity = {"fps": float(fps), "rate_hz": int(rate_hz), "text_encoder": self.text.identity}
        identity |= {name: codec.identity for name, codec in made.items() if codec is not None}
        if self.controls:
            identity["controls"] = ",".join(name for name in CONTROLS if name in self.controls)
        if self.reference_tokens:
            identity["reference_tokens"] = self.reference_tokens
        if self.audio is not None:  # 0 for none, so that a run without a peak and a set with one are told apart
            identity["peak"] = float(self.peak or 0)
        return identity


@torch.inference_mode()
def encode_clip(clip: RawClip, encoders: Encoders, *, source: str = "") -> EncodedSample:
    """A clip with its tracks -> texts [L, D], latents [C, T, h, w] and [L, C], features [F, K, D] of each track, sound.

    Raises ValueError naming the clip's key if its frames or sound are not what a RawClip promises.
    """
    tracks = {name: track for name in (*TRACKS, "speech_second") if (track := getattr(clip, name)) is not None}
    num_frames, height, width = (0, 0, 0) if clip.frames is None else clip.frames.shape[:3]
    expected = round(num_frames / clip.fps * clip.rate_hz) if num_frames else len(clip.speech)
    for name, track in tracks.items():
        if track.shape != (expected,):
            lasting = (
                f"{num_frames} frames at {clip.fps} fps and {clip.rate_hz} Hz last" if num_frames else "speech has"
            )
            raise ValueError(f"clip {clip.key}: {name} has {list(track.shape)} samples; {lasting} {expected}")
    video_latents, features, controls = None, {}, {}
    if encoders.video is not None:
        if clip.frames is None:
            raise ValueError(f"clip {clip.key}: sound without picture, for a shard set with a video codec")
        video_latents = picture_latents(clip.frames, codec=encoders.video)
        controls = {
            name: picture_latents(_control(clip, name, clip.frames), codec=encoders.video)
            for name in encoders.controls
            if getattr(clip, name) is not None
        }
    if encoders.tracks is not None:
        features = {
            name: track_features(track, rate_hz=clip.rate_hz, encoder=encoders.tracks, num_frames=num_frames)
            for name, track in tracks.items()
        }
    sound, audio_latents, references = clip.mix, None, []
    if encoders.audio is not None:
        sound = sound * gain_to_peak(sound, encoders.peak)
        audio_latents = sound_latents(sound, rate_hz=clip.rate_hz, codec=encoders.audio)
        if encoders.reference_tokens:
            references = [
                sound_latents(other * gain_to_peak(other, encoders.peak), rate_hz=clip.rate_hz, codec=encoders.audio)[
                    : encoders.reference_tokens
                ]
                for other in clip.references[:MAX_REFERENCES]
            ]
    captions = {style: clip.captions[style] for style in encoders.captions if style in clip.captions}
    annotation = Annotation(
        caption=clip.caption,
        transcript=clip.transcript,
        subset=clip.subset,
        fps=float(clip.fps),
        rate_hz=int(clip.rate_hz),
        num_frames=num_frames,
        height=height,
        width=width,
        duration_s=0.0 if num_frames else expected / clip.rate_hz,
        captions=captions,
        mouth_boxes=clip.mouth_boxes,
        truth=clip.truth,
        source=source,
    )
    texts = {style: encoders.text.encode(text).float().numpy() for style, text in captions.items()}
    return EncodedSample(
        key=clip.key,
        annotation=annotation,
        texts={CAPTION: encoders.text.encode(clip.caption).float().numpy(), **texts},
        video_latents=video_latents,
        audio_latents=audio_latents,
        references=tuple(references),
        waveform=sound.astype(np.float32),
        **features,
        **controls,
    )


def picture_latents(frames: np.ndarray, *, codec: VideoCodec) -> np.ndarray:
    """Frames uint8 [F, H, W, 3] -> latents [C, T, h, w] of a video codec."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float().div(127.5).sub(1)  # [3, F, H, W]
    return codec.encode(video[None])[0].float().cpu().numpy()


def sound_latents(sound: np.ndarray, *, rate_hz: int, codec: AudioCodec) -> np.ndarray:
    """A sound [N] at `rate_hz` -> latents [L, C] of an audio codec."""
    waveform = torch.from_numpy(np.ascontiguousarray(resample(sound, rate_hz, codec.rate_hz), np.float32))
    return codec.encode(waveform[None])[0].float().cpu().numpy()


def track_features(track: np.ndarray, *, rate_hz: int, encoder: TrackEncoder, num_frames: int) -> np.ndarray:
    """A track [N] at `rate_hz` that covers `num_frames` of video -> features [F, K, D] at the video's frame rate."""
    waveform = torch.from_numpy(np.ascontiguousarray(resample(track, rate_hz, encoder.rate_hz), np.float32))
    return encoder.encode(waveform, num_frames=num_frames).float().numpy()


def _control(clip: RawClip, name: str, frames: np.ndarray) -> np.ndarray:
    """A control of a clip as frames [F or 1, H, W, 3]; ValueError where they are not of the clip's size."""
    pictures = getattr(clip, name)
    expected = frames.shape[1:] if name == "reference_image" else frames.shape
    if pictures.shape != expected or pictures.dtype != np.uint8:
        raise ValueError(
            f"clip {clip.key}: {name} is {pictures.dtype} {list(pictures.shape)}; beside its frames it must be uint8 "
            f"{list(expected)}"
        )
    return pictures[None] if name == "reference_image" else pictures
