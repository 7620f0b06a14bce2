"""Frames and sound to MP4: at once, or streamed while they are made; where sampling ends."""

from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame

from avlit.sound import resample

AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
AAC_FRAME = 1024
"""Samples that one frame of AAC holds."""
WATCHABLE = 256
"""Pixels that the shorter side of a written clip has at least, unless a scale is given."""


class MP4Writer:
    """An MP4 that browsers play (H.264 and AAC), written piece by piece: memory does not grow with its length.

    size: (height, width) of the frames. rate_hz: of the mono sound, one of AAC_RATES; None writes no sound.
    scale: each pixel becomes a square of this many; by default as many as it takes for the shorter side to have 256.
    Odd sizes repeat their last row or column. A context manager: the file appears complete when the block ends, or,
    where it ends with an error, not at all. The bytes do not depend on how the sound is divided into pieces.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        size: tuple[int, int],
        fps: float,
        rate_hz: int | None = None,
        scale: int | None = None,
    ) -> None:
        if rate_hz is not None and rate_hz not in AAC_RATES:
            raise ValueError(f"rate_hz={rate_hz}: AAC has the rates {', '.join(map(str, AAC_RATES))}; resample first")
        self.path, self.size, self.rate_hz = Path(path), size, rate_hz
        self.scale = scale or max(1, -(-WATCHABLE // min(size)))
        self._part = self.path.with_name(f"{self.path.name}.part")
        self._container = av.open(str(self._part), "w", format="mp4", options={"movflags": "+faststart"})
        rate = Fraction(fps).limit_denominator(60000)
        self._video = self._container.add_stream("libx264", rate=rate, options={"crf": "14", "preset": "veryfast"})
        self._video.height, self._video.width = (-(-pixels * self.scale // 2) * 2 for pixels in size)
        self._video.pix_fmt = "yuv420p"
        self._audio = None
        if rate_hz is not None:
            self._audio = self._container.add_stream("aac", rate=rate_hz, layout="mono", options={"b": "128k"})
        self._waiting = np.zeros(0, np.float32)  # sound that does not fill a frame of AAC yet
        self._num_samples = 0  # of the sound that the encoder has

    def write(self, frames: np.ndarray, waveform: np.ndarray | None = None) -> None:
        """The next frames, uint8 [F, H, W, 3], and the next mono sound, [N] in [-1, 1], best that of the same time."""
        if frames.dtype != np.uint8 or frames.shape[1:] != (*self.size, 3):
            raise ValueError(f"frames of shape {frames.shape}, {frames.dtype}: this MP4 has uint8 {(*self.size, 3)}")
        if (waveform is not None) != (self._audio is not None) or (waveform is not None and waveform.ndim != 1):
            found = None if waveform is None else waveform.shape
            raise ValueError(f"sound of shape {found}: this MP4 has {'mono sound [N]' if self._audio else 'none'}")
        height, width = self._video.height, self._video.width
        for picture in frames:
            picture = picture.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
            edges = ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0))
            picture = np.ascontiguousarray(np.pad(picture, edges, mode="edge"))
            self._container.mux(self._video.encode(VideoFrame.from_ndarray(picture, format="rgb24")))
        if waveform is not None:
            sound = np.concatenate([self._waiting, np.clip(waveform, -1.0, 1.0).astype(np.float32)])
            whole = len(sound) // AAC_FRAME * AAC_FRAME
            self._encode_sound(sound[:whole])
            self._waiting = sound[whole:]

    def _encode_sound(self, samples: np.ndarray) -> None:
        assert self._audio is not None and self.rate_hz is not None
        for start in range(0, len(samples), AAC_FRAME):
            sound = AudioFrame.from_ndarray(samples[None, start : start + AAC_FRAME], format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = self.rate_hz, self._num_samples, Fraction(1, self.rate_hz)
            self._container.mux(self._audio.encode(sound))
            self._num_samples += sound.samples

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._container.mux(self._video.encode(None))
                if self._audio is not None:
                    self._encode_sound(self._waiting)
                    self._container.mux(self._audio.encode(None))
            self._container.close()
            if kind is None:
                self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)


def write_mp4(
    path: Path | str,
    frames: np.ndarray,
    *,
    fps: float,
    waveform: np.ndarray | None = None,
    rate_hz: int | None = None,
    scale: int | None = None,
) -> None:
    """frames uint8 [F, H, W, 3] and mono sound [N] in [-1, 1] of any rate -> a file as `MP4Writer` makes it."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ValueError(f"frames of shape {frames.shape}, {frames.dtype}: write_mp4 writes uint8 [F, H, W, 3], F > 0")
    if waveform is not None and (rate_hz is None or waveform.ndim != 1):
        raise ValueError(f"a waveform of shape {waveform.shape} at rate_hz={rate_hz}: sound is mono [N] with its rate")
    target = None
    if waveform is not None and rate_hz is not None:
        target = rate_hz if rate_hz in AAC_RATES else 48000
        waveform = resample(waveform.astype(np.float32), rate_hz, target)
    height, width = frames.shape[1:3]
    with MP4Writer(path, size=(height, width), fps=fps, rate_hz=target, scale=scale) as movie:
        movie.write(frames, waveform)
