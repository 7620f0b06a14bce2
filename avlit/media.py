"""Media files to arrays and back: clips and sounds in, MP4s with sound and contact sheets out."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from scipy.signal import resample_poly

from avlit.contact_sheet import contact_sheet

__all__ = [
    "MediaClip",
    "MediaError",
    "MediaInfo",
    "NoAudioError",
    "NoVideoError",
    "contact_sheet",
    "probe",
    "read_audio",
    "read_clip",
    "write_mp4",
]

AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
WATCHABLE = 256
"""Pixels that the shorter side of a written clip has at least, unless a scale is given."""
GAP_S = 0.02
"""A hole in the sound's time stamps longer than this is kept as silence; shorter ones are rounding."""


class MediaError(ValueError):
    """A file that cannot be used; the message starts with its path and says why."""


class NoVideoError(MediaError):
    """The file has no video stream (a cover picture does not count)."""


class NoAudioError(MediaError):
    """The file has no audio stream."""


@dataclass(frozen=True)
class MediaInfo:
    """What a file says of itself, before decoding: pixels as shown, seconds; None for a stream it does not have."""

    duration_s: float
    fps: float | None
    height: int | None
    width: int | None
    rate_hz: int | None
    audio_channels: int | None


@dataclass(frozen=True)
class MediaClip:
    """frames uint8 [F, H, W, 3] RGB at `fps`; waveform float32 [N] mono in [-1, 1], N = F / fps * rate_hz, or None."""

    frames: np.ndarray
    fps: float
    waveform: np.ndarray | None
    rate_hz: int | None


def probe(path: Path | str) -> MediaInfo:
    """Sizes and rates of a file with at least one usable stream; MediaError where there is none."""
    with _opened(path) as container:
        video, audio = _video_stream(container), _audio_stream(container)
        if video is None and audio is None:
            raise MediaError(f"{path}: has neither video nor sound")
        seconds = [float(stream.duration * stream.time_base) for stream in (video, audio)
                   if stream is not None and stream.duration and stream.time_base]  # fmt: skip
        duration = max(seconds, default=(container.duration or 0) / av.time_base)
        return MediaInfo(
            duration_s=duration,
            fps=float(_rate(path, video)) if video else None,
            height=video.codec_context.height if video else None,
            width=video.codec_context.width if video else None,
            rate_hz=audio.codec_context.sample_rate if audio else None,
            audio_channels=audio.codec_context.channels if audio else None,
        )


def read_clip(
    path: Path | str,
    *,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    rate_hz: int | None = 16000,
    start_s: float = 0.0,
    duration_s: float | None = None,
) -> MediaClip:
    """Frames and sound from `start_s` after the first frame on; the whole file without `duration_s`.

    fps: output frame i is the source frame with the time stamp nearest to start_s + i / fps; None keeps the file's.
    size: (height, width); frames are scaled until they just cover it and cut around the centre; None keeps the file's.
    rate_hz: sound is mixed to mono by the mean, resampled, and cut or filled with silence to the frames' length;
    None keeps the picture alone. Raises NoVideoError, NoAudioError, or MediaError for a file that is missing, broken,
    or ends before it says it does.
    """
    if (fps is not None and not fps > 0) or start_s < 0 or (duration_s is not None and not duration_s > 0):
        raise ValueError(f"fps={fps}, start_s={start_s}, duration_s={duration_s}: rates and lengths must be positive")
    frames: list[np.ndarray] = []
    end_s = math.inf if duration_s is None else start_s + duration_s
    with _opened(path) as container:
        video = _video_stream(container)
        if video is None:
            raise NoVideoError(f"{path}: has no video stream")
        if rate_hz is not None and _audio_stream(container) is None:
            raise NoAudioError(f"{path}: has no audio stream")
        rate = float(_rate(path, video)) if fps is None else fps
        limit = math.inf if duration_s is None else max(1, round(duration_s * rate))
        origin = _start_s(video)
        for frame, repeats in _nearest(_decoded(path, container, video, start_s, end_s, origin), start_s, rate, limit):
            frames.extend([_to_array(frame, size)] * repeats)
        if not frames:
            raise MediaError(f"{path}: has no frame from {start_s:g} s on")
        declared = float(video.duration * video.time_base) if video.duration and video.time_base else 0.0
        found = start_s + len(frames) / rate
        if found < min(end_s, declared) - max(0.5, 0.05 * declared):
            raise MediaError(f"{path}: is cut off; it declares {declared:.2f} s of video and ends after {found:.2f} s")
    waveform = None
    if rate_hz is not None:
        length_s = len(frames) / rate
        waveform = _read_sound(path, rate_hz, origin + start_s, length_s)
        waveform = _fit(waveform, round(length_s * rate_hz))
    return MediaClip(frames=np.stack(frames), fps=rate, waveform=waveform, rate_hz=rate_hz)


def read_audio(path: Path | str, rate_hz: int) -> np.ndarray:
    """A sound file's (or a video's) sound as float32 [N] mono in [-1, 1] at `rate_hz`, from its own first sample on."""
    return _read_sound(path, rate_hz, None, math.inf)


def write_mp4(
    path: Path | str,
    frames: np.ndarray,
    *,
    fps: float,
    waveform: np.ndarray | None = None,
    rate_hz: int | None = None,
    scale: int | None = None,
) -> None:
    """frames uint8 [F, H, W, 3] and mono sound [N] in [-1, 1] -> H.264 and AAC that browsers play.

    scale: each pixel becomes a square of this many; by default as many as it takes for the shorter side to have 256.
    Odd sizes repeat their last row or column. The file appears complete or not at all.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ValueError(f"frames of shape {frames.shape}, {frames.dtype}: write_mp4 writes uint8 [F, H, W, 3], F > 0")
    if waveform is not None and (rate_hz is None or waveform.ndim != 1):
        raise ValueError(f"a waveform of shape {waveform.shape} at rate_hz={rate_hz}: sound is mono [N] with its rate")
    scale = scale or max(1, -(-WATCHABLE // min(frames.shape[1:3])))
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    with av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        _encode(container, frames, Fraction(fps).limit_denominator(60000), scale, waveform, rate_hz)
    part.replace(path)


def _encode(
    container: OutputContainer,
    frames: np.ndarray,
    fps: Fraction,
    scale: int,
    waveform: np.ndarray | None,
    rate_hz: int | None,
) -> None:
    height, width = (-(-pixels * scale // 2) * 2 for pixels in frames.shape[1:3])
    video = container.add_stream("libx264", rate=fps, options={"crf": "14", "preset": "veryfast"})
    video.width, video.height, video.pix_fmt = width, height, "yuv420p"
    audio = None
    if waveform is not None and rate_hz is not None:
        target = rate_hz if rate_hz in AAC_RATES else 48000
        samples = np.clip(_resample(waveform.astype(np.float32), rate_hz, target), -1.0, 1.0).astype(np.float32)
        audio = container.add_stream("aac", rate=target, layout="mono", options={"b": "128k"})
    for picture in frames:
        picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
        picture = np.pad(picture, ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)), mode="edge")
        container.mux(video.encode(VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
    container.mux(video.encode(None))
    if audio is None:
        return
    for start in range(0, len(samples), 1024):
        sound = AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = target, start, Fraction(1, target)
        container.mux(audio.encode(sound))
    container.mux(audio.encode(None))


@contextmanager
def _opened(path: Path | str) -> Iterator[InputContainer]:
    if not Path(path).is_file():  # PyAV would also take a URL
        raise MediaError(f"{path}: there is no such file")
    try:
        container = av.open(str(path), metadata_errors="replace")
    except (FFmpegError, OSError) as error:
        raise MediaError(f"{path}: cannot be read as a media file ({error.strerror})") from error
    with container:
        yield container


def _video_stream(container: InputContainer) -> av.VideoStream | None:
    """The first video stream that moves; a sound file's cover picture is a stream too."""
    covers = Disposition.attached_pic
    return next((stream for stream in container.streams.video if not stream.disposition & covers), None)


def _audio_stream(container: InputContainer) -> av.AudioStream | None:
    return next(iter(container.streams.audio), None)


def _rate(path: Path | str, stream: av.VideoStream) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise MediaError(f"{path}: does not say its frame rate; give fps")
    return rate


def _start_s(stream: Stream) -> float:
    return float((stream.start_time or 0) * (stream.time_base or 0))


def _decoded(
    path: Path | str, container: InputContainer, stream: av.VideoStream, start_s: float, end_s: float, origin: float
) -> Iterator[tuple[float, VideoFrame]]:
    """(seconds after the stream's first frame, frame), from the key frame before `start_s` to just past `end_s`."""
    stream.thread_type = "AUTO"
    assert stream.time_base is not None
    if start_s > 0:
        container.seek(int((origin + start_s) / stream.time_base), stream=stream, backward=True)
    last = -math.inf
    try:
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            seconds = float(frame.pts * stream.time_base) - origin
            if seconds > last:  # a damaged stream repeats stamps
                yield seconds, frame
            last = max(last, seconds)
            if seconds > end_s:
                return
    except FFmpegError as error:
        raise MediaError(f"{path}: breaks off after {max(last, 0.0):.2f} s of video ({error.strerror})") from error


def _nearest(
    decoded: Iterator[tuple[float, VideoFrame]], start_s: float, fps: float, limit: float
) -> Iterator[tuple[VideoFrame, int]]:
    """(frame, how many output frames it is nearest to) for outputs at start_s, start_s + 1 / fps, ..., `limit` of them.

    The last frame lasts as long as the one before it.
    """
    count, held, held_s, step_s = 0, None, 0.0, 1.0 / fps
    for seconds, frame in decoded:
        if held is not None:
            step_s = seconds - held_s
            # outputs up to the middle between two stamps belong to the earlier one; stamps are rounded, hence 1e-3
            until = min(limit, math.floor(((held_s + seconds) / 2 - start_s) * fps + 1e-3) + 1)
            if until > count:
                yield held, int(until - count)
                count = until
        if count >= limit:
            return
        held, held_s = frame, seconds
    if held is not None:
        until = min(limit, math.floor((held_s + step_s - start_s) * fps + 1e-3))
        if until > count:
            yield held, int(until - count)


def _to_array(frame: VideoFrame, size: tuple[int, int] | None) -> np.ndarray:
    """One frame as uint8 [H, W, 3], turned as its metadata asks, scaled to cover `size` and cut around the centre."""
    turns = round(frame.rotation / 90) % 4
    if size is None:
        return np.rot90(frame.to_ndarray(format="rgb24"), turns)
    height, width = size if turns % 2 == 0 else size[::-1]
    factor = max(height / frame.height, width / frame.width)
    scaled_height, scaled_width = max(height, round(frame.height * factor)), max(width, round(frame.width * factor))
    picture = frame.to_ndarray(format="rgb24", width=scaled_width, height=scaled_height, interpolation="BICUBIC")
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return np.ascontiguousarray(np.rot90(picture[top : top + height, left : left + width], turns))


def _read_sound(path: Path | str, rate_hz: int, start_s: float | None, length_s: float) -> np.ndarray:
    """Mono sound from `start_s` of the file's clock (None: from the sound's beginning) for at most `length_s`."""
    with _opened(path) as container:
        stream = _audio_stream(container)
        if stream is None:
            raise NoAudioError(f"{path}: has no audio stream")
        native = stream.codec_context.sample_rate
        if not native or stream.time_base is None:
            raise MediaError(f"{path}: does not say the rate of its sound")
        start_s = _start_s(stream) if start_s is None else start_s
        if start_s > 1.0:  # a second earlier: decoders need some packets to settle
            container.seek(int((start_s - 1.0) / stream.time_base), stream=stream, backward=True)
        pieces: list[tuple[int, np.ndarray]] = []  # (place of the first sample after start_s, samples)
        place: int | None = None
        try:
            for frame in container.decode(stream):
                if frame.sample_rate != native:
                    raise MediaError(f"{path}: its sound changes rate from {native} to {frame.sample_rate} Hz")
                if frame.pts is not None and frame.time_base is not None:
                    stamped = round((float(frame.pts * frame.time_base) - start_s) * native)
                    if place is None or abs(stamped - place) > GAP_S * native:
                        place = stamped
                place = place or 0
                samples = _to_mono(frame)
                pieces.append((place, samples))
                place += len(samples)
                if place > (length_s + 0.1) * native:  # what the resampler's filter reads beyond the end
                    break
        except FFmpegError as error:
            raise MediaError(f"{path}: its sound cannot be decoded ({error.strerror})") from error
    if not pieces:
        raise MediaError(f"{path}: its audio stream is empty")
    end = max(place + len(samples) for place, samples in pieces)
    sound = np.zeros(max(end, 0), np.float32)
    for place, samples in pieces:
        samples = samples[max(0, -place) :]
        sound[max(0, place) : max(0, place) + len(samples)] = samples
    return np.clip(_resample(sound, native, rate_hz), -1.0, 1.0)


def _to_mono(frame: AudioFrame) -> np.ndarray:
    """A decoded frame of any sample format -> float32 [N], the mean of its channels."""
    decoded = frame.to_ndarray()
    samples = decoded.astype(np.float64)
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if decoded.dtype == np.uint8:
        samples = (samples - 128.0) / 128.0
    elif decoded.dtype in (np.int16, np.int32):
        samples = samples / 2.0 ** (8 * decoded.dtype.itemsize - 1)
    return samples.mean(axis=0).astype(np.float32)


def _resample(samples: np.ndarray, source_hz: int, rate_hz: int) -> np.ndarray:
    """[N] -> [ceil(N * rate / source)] by a linear-phase polyphase filter: no delay."""
    if source_hz == rate_hz or samples.size == 0:
        return samples
    ratio = Fraction(rate_hz, source_hz)
    return resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)


def _fit(samples: np.ndarray, count: int) -> np.ndarray:
    return np.pad(samples[:count], (0, max(0, count - len(samples))))
