"""RawClip to EncodedSample: frames to latents, tracks to features, caption to text, through the codecs' interfaces."""

from dataclasses import dataclass
from math import gcd

import numpy as np
import torch

from avlit.codecs import TextEncoder, TrackEncoder, VideoCodec
from data.clip import RawClip
from data.sample import Annotation, EncodedSample
from data.shards import Identity


@dataclass(frozen=True)
class Encoders:
    """The three encoders that make a clip's latents, track features and text."""

    video: VideoCodec
    tracks: TrackEncoder
    text: TextEncoder

    def identity(self, *, fps: float, rate_hz: int) -> Identity:
        """What a shard set made with these encoders is identified by."""
        return {
            "fps": float(fps),
            "rate_hz": int(rate_hz),
            "video_codec": self.video.identity,
            "track_encoder": self.tracks.identity,
            "text_encoder": self.text.identity,
        }


@torch.inference_mode()
def encode_clip(clip: RawClip, encoders: Encoders, *, source: str = "") -> EncodedSample:
    """A clip with its tracks -> latents [C, T, h, w], features [F, K, D] of each track, text [L, D], and its sound.

    Raises ValueError naming the clip's key if its frames or sound are not what a RawClip promises.
    """
    num_frames, height, width = clip.frames.shape[:3]
    expected = round(num_frames / clip.fps * clip.rate_hz)
    for name in ("speech", "effects", "music", "speech_second"):
        track = getattr(clip, name)
        if track is not None and track.shape != (expected,):
            raise ValueError(
                f"clip {clip.key}: {name} has {list(track.shape)} samples; {num_frames} frames at {clip.fps} fps "
                f"and {clip.rate_hz} Hz last {expected}"
            )
    video = torch.from_numpy(clip.frames).permute(3, 0, 1, 2).float().div(127.5).sub(1)  # [3, F, H, W]

    def features(track: np.ndarray) -> np.ndarray:
        return track_features(track, rate_hz=clip.rate_hz, encoder=encoders.tracks, num_frames=num_frames)

    tracks = {name: features(getattr(clip, name)) for name in ("speech", "effects", "music")}
    second = None if clip.speech_second is None else features(clip.speech_second)
    annotation = Annotation(
        caption=clip.caption,
        transcript=clip.transcript,
        subset=clip.subset,
        fps=float(clip.fps),
        rate_hz=int(clip.rate_hz),
        num_frames=num_frames,
        height=height,
        width=width,
        mouth_boxes=clip.mouth_boxes,
        truth=clip.truth,
        source=source,
    )
    return EncodedSample(
        key=clip.key,
        annotation=annotation,
        video_latents=encoders.video.encode(video[None])[0].float().numpy(),
        text=encoders.text.encode(clip.caption).float().numpy(),
        **tracks,
        speech_second=second,
        waveform=clip.mix.astype(np.float32),
    )


def track_features(track: np.ndarray, *, rate_hz: int, encoder: TrackEncoder, num_frames: int) -> np.ndarray:
    """A track [N] at `rate_hz` that covers `num_frames` of video -> features [F, K, D] at the video's frame rate."""
    if rate_hz != encoder.rate_hz:
        from scipy.signal import resample_poly

        divisor = gcd(rate_hz, encoder.rate_hz)
        track = resample_poly(track, encoder.rate_hz // divisor, rate_hz // divisor)
    waveform = torch.from_numpy(np.ascontiguousarray(track, np.float32))
    return encoder.encode(waveform, num_frames=num_frames).float().numpy()
