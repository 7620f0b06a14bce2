"""Media files to arrays: clips, sounds and pictures in; `avlit/mp4.py` and `avlit/contact_sheet.py` are the way out."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from PIL import Image, ImageOps

from avlit.contact_sheet import contact_sheet
from avlit.errors import UserError
from avlit.mp4 import MP4Writer, write_mp4
from avlit.sound import fit, resample, to_mono, write_sound

__all__ = [
    "MP4Writer",
    "MediaClip",
    "MediaError",
    "MediaInfo",
    "NoAudioError",
    "NoVideoError",
    "audio_length_s",
    "contact_sheet",
    "probe",
    "read_audio",
    "read_clip",
    "read_image",
    "write_mp4",
    "write_sound",
]

GAP_S = 0.02
"""A hole in the sound's time stamps longer than this is kept as silence; shorter ones are rounding."""


class MediaError(UserError):
    """A file that cannot be used; the message starts with its path and says why."""


class NoVideoError(MediaError):
    """The file has no video stream (a cover picture does not count)."""


class NoAudioError(MediaError):
    """The file has no audio stream."""


@dataclass(frozen=True)
class MediaInfo:
    """What a file says of itself, before decoding: pixels as shown, seconds; None for a stream it does not have.

    duration_s: of its longest stream; picture_s: of its picture.
    """

    duration_s: float
    picture_s: float | None
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
        seconds = {stream.type: float(stream.duration * stream.time_base) for stream in (video, audio)
                   if stream is not None and stream.duration and stream.time_base}  # fmt: skip
        whole = (container.duration or 0) / av.time_base
        return MediaInfo(
            duration_s=max(seconds.values(), default=whole),
            picture_s=seconds.get("video", whole) if video else None,
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
        waveform = _read_sound(path, rate_hz, origin_s=origin, start_s=start_s, length_s=length_s)
        waveform = fit(waveform, round(length_s * rate_hz))
    return MediaClip(frames=np.stack(frames), fps=rate, waveform=waveform, rate_hz=rate_hz)


def read_audio(
    path: Path | str,
    rate_hz: int,
    *,
    start_s: float = 0.0,
    duration_s: float | None = None,
    after_picture: bool = False,
) -> np.ndarray:
    """A sound file's (or a video's) sound as float32 [N] mono in [-1, 1] at `rate_hz`.

    start_s, duration_s: the part that is read, from the sound's own first sample on, or with after_picture from the
    first frame on, as in `read_clip`; shorter where the sound ends, and empty beyond. A part equals the same part of
    the whole bit for bit where the file's time stamps are exact.
    """
    # From a whole second on, where samples of any two rates meet, and one earlier for the resampler's filter.
    lead_s = max(0, math.floor(start_s) - 1)
    end_s = math.inf if duration_s is None else start_s + duration_s
    origin_s = _picture_start_s(path) if after_picture else None
    sound = _read_sound(path, rate_hz, origin_s=origin_s, start_s=float(lead_s), length_s=end_s - lead_s)
    first = round((start_s - lead_s) * rate_hz)
    return sound[first:] if duration_s is None else sound[first : first + round(duration_s * rate_hz)]


def audio_length_s(path: Path | str) -> float:
    """Seconds of a file's sound, by decoding all of it: what `read_audio` would stumble on is found here.

    Memory does not grow with the length. Raises MediaError as `read_audio` does, and where the file is cut off.
    """
    with _opened(path) as container:
        stream, native = _sound_stream(path, container)
        end = 0
        for place, samples in _sound_pieces(path, container, stream, native, _start_s(stream)):
            end = max(end, place + len(samples))
        declared = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    if end <= 0:
        raise MediaError(f"{path}: its audio stream is empty")
    if end / native < declared - max(0.5, 0.05 * declared):
        raise MediaError(
            f"{path}: is cut off; it declares {declared:.2f} s of sound and ends after {end / native:.2f} s"
        )
    return end / native


def read_image(path: Path | str, *, size: tuple[int, int] | None) -> np.ndarray:
    """A picture file -> uint8 [H, W, 3] of `size` (height, width), upright, scaled to cover and cut as clips are.

    size None keeps the file's.
    """
    if not Path(path).is_file():
        raise MediaError(f"{path}: there is no such file")
    try:
        with Image.open(path) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
        raise MediaError(f"{path}: cannot be read as a picture ({error})") from error
    return _to_array(VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"), size)


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


def _picture_start_s(path: Path | str) -> float:
    with _opened(path) as container:
        video = _video_stream(container)
        if video is None:
            raise NoVideoError(f"{path}: has no video stream")
        return _start_s(video)


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


def _read_sound(
    path: Path | str, rate_hz: int, *, origin_s: float | None, start_s: float, length_s: float
) -> np.ndarray:
    """Mono sound from `start_s` after `origin_s` on the file's clock (None: the sound's beginning) for `length_s`.

    What the resampler's filter reads beyond the end may follow.
    """
    with _opened(path) as container:
        stream, native = _sound_stream(path, container)
        begin_s = start_s + (_start_s(stream) if origin_s is None else origin_s)
        pieces: list[tuple[int, np.ndarray]] = []
        for place, samples in _sound_pieces(path, container, stream, native, begin_s):
            pieces.append((place, samples))
            if place + len(samples) > (length_s + 0.1) * native:
                break
    if not pieces and start_s == 0:
        raise MediaError(f"{path}: its audio stream is empty")
    end = max((place + len(samples) for place, samples in pieces), default=0)
    sound = np.zeros(max(end, 0), np.float32)
    for place, samples in pieces:
        samples = samples[max(0, -place) :]
        sound[max(0, place) : max(0, place) + len(samples)] = samples
    return np.clip(resample(sound, native, rate_hz), -1.0, 1.0)


def _sound_stream(path: Path | str, container: InputContainer) -> tuple[av.AudioStream, int]:
    """The audio stream and its rate; NoAudioError without one."""
    stream = _audio_stream(container)
    if stream is None:
        raise NoAudioError(f"{path}: has no audio stream")
    if not stream.codec_context.sample_rate or stream.time_base is None:
        raise MediaError(f"{path}: does not say the rate of its sound")
    return stream, stream.codec_context.sample_rate


def _sound_pieces(
    path: Path | str, container: InputContainer, stream: av.AudioStream, native: int, start_s: float
) -> Iterator[tuple[int, np.ndarray]]:
    """(place of the first sample after `start_s` of the file's clock, mono samples [N]) at the native rate."""
    if start_s > 1.0:  # a second earlier: decoders need some packets to settle
        assert stream.time_base is not None
        container.seek(int((start_s - 1.0) / stream.time_base), stream=stream, backward=True)
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
            samples = to_mono(frame)
            yield place, samples
            place += len(samples)
    except FFmpegError as error:
        raise MediaError(f"{path}: its sound cannot be decoded ({error.strerror})") from error
