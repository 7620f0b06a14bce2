"""From one media file to its windows: frames and tracks at the asked rates and size, in pieces of constant memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from avlit.media import MediaClip, MediaError, NoAudioError, probe, read_audio, read_clip
from avlit.timing import Timing
from data.prepare.descriptions import Rejected
from data.prepare.mouths import Box, MouthFinder
from data.prepare.separation import Separator, split

STEMS = ("speech", "effects", "music", "speech_second")
"""Tracks that may lie beside a clip as `NAME.TRACK.wav`, from the clip's first frame on."""

SILENCE_RMS = 1e-3
"""-60 dB: below it a window counts as silent; rooms are louder."""

SLACK_S = 0.5
"""What is said in a clip is said in its window if the clip is at most this much longer."""

CROP_REMARK = 0.7
"""Share of the picture that the centre crop keeps below which the report says so."""

PIECE_S, PIECE_BYTES = 60.0, 1 << 28
"""Most seconds and bytes of frames that are read, and whose sound is separated, at once."""


@dataclass(frozen=True)
class Window:
    """Frames uint8 [F, H, W, 3], or None, and tracks float32 [N] of one window; `start_s` to `end_s` of the file.

    Silence may follow after `end_s` where there is no picture. mouth_boxes: of each frame and person (`MouthFinder`).
    """

    number: int
    start_s: float
    end_s: float
    frames: np.ndarray | None
    speech: np.ndarray
    effects: np.ndarray
    music: np.ndarray
    speech_second: np.ndarray | None
    mouth_boxes: list[list[Box]] = field(default_factory=list)


class ClipWindows:
    """The windows of one file, cut while it is read from its beginning to its end.

    Raises Rejected where nothing of the file can be used. separator: makes the tracks where there are no stems; None
    leaves the file's own sound whole, as `speech`, and reads no stems. mouths: finds them in every window that is
    kept; without it there are no lists of boxes. tracks: what made them, in words. duration_s: what the file says.
    notes: remarks for the report, complete once the windows have been read.
    """

    def __init__(
        self,
        path: Path,
        *,
        timing: Timing,
        stride_frames: int,
        separator: Separator | None,
        mouths: MouthFinder | None = None,
    ) -> None:
        self._path, self._timing, self._stride, self._separator = path, timing, stride_frames, separator
        self._mouths = mouths
        self.notes: list[str] = []
        try:
            info = probe(path)
        except MediaError as error:
            raise Rejected(reason(path, error)) from error
        if info.fps is None:
            raise Rejected("no video stream")
        self.duration_s = info.duration_s
        self._stems = None if separator is None else self._read_stems()
        if self._stems is None and info.rate_hz is None:
            raise Rejected("no audio stream")
        self.tracks = "ready-made stems" if self._stems else separator.name if separator else ""
        if info.fps < 0.9 * timing.fps:
            self.notes.append(f"{info.fps:.4g} frames a second, repeated to {timing.fps:g}")
        if min(info.height or 0, info.width or 0) < 0.75 * min(timing.height, timing.width):
            self.notes.append(f"{info.width}x{info.height} pixels, scaled up")
        self.notes += _crop_note(info.height or 0, info.width or 0, timing)

    @property
    def is_cut(self) -> bool:
        """Whether a window holds noticeably less than the whole clip."""
        return self.duration_s > self._timing.duration_s + SLACK_S

    @property
    def _frame_s(self) -> float:
        return 1 / self._timing.fps

    def read(self) -> Iterator[Window | Rejected]:
        """Every whole window in order, or Rejected for one that is left out; raises Rejected where there is none.

        Of a file that breaks off, the windows before the damage are kept and the damage is noted.
        """
        number, per_piece = 0, self._windows_per_piece()
        damage: str | None = None
        while number == 0 or self._fits(number):
            try:
                piece = self._read_piece(number, per_piece)
            except MediaError as error:
                damage = damage or reason(self._path, error)
                if per_piece == 1:
                    break
                per_piece = 1  # windows before the damage can still be read one by one
                continue
            count = (len(piece.frames) - self._timing.num_frames) // self._stride + 1
            if count < 1 and number == 0 and damage is None:
                raise Rejected(
                    f"too short: {len(piece.frames) * self._frame_s:.2f} s; a window needs "
                    f"{self._timing.duration_s:.2f} s ({self._timing.num_frames} frames at {self._timing.fps:g} fps)"
                )
            yield from self._cut(piece, number, count)
            number += max(count, 0)
            if count < per_piece:
                break
        if damage is not None and number == 0:
            raise Rejected(damage)
        if damage is not None:
            self.notes.append(f"{damage}; what comes before is used")

    def _fits(self, number: int) -> bool:
        """Whether the file says that it is long enough for one more window; one that does not say is tried."""
        end_s = (number * self._stride + self._timing.num_frames) * self._frame_s
        return not self.duration_s or end_s <= self.duration_s + self._frame_s

    def _windows_per_piece(self) -> int:
        timing = self._timing
        if self._stride > timing.num_frames:
            return 1  # what lies between windows is skipped, not read
        most = min(PIECE_S * timing.fps, PIECE_BYTES / (timing.height * timing.width * 3))
        return max(1, int((most - timing.num_frames) // self._stride) + 1)

    def _read_piece(self, number: int, count: int) -> MediaClip:
        """Frames of `count` windows from window `number` on, with their sound unless stems are used."""
        timing = self._timing
        rate_hz = (None if self._separator is None else self._separator.rate_hz) or timing.rate_hz
        return read_clip(
            self._path,
            fps=timing.fps,
            size=(timing.height, timing.width),
            rate_hz=None if self._stems else rate_hz,
            start_s=number * self._stride * self._frame_s,
            duration_s=((count - 1) * self._stride + timing.num_frames) * self._frame_s,
        )

    def _cut(self, piece: MediaClip, first: int, count: int) -> Iterator[Window | Rejected]:
        """The windows `first` to `first + count` out of the frames and sound of a piece."""
        timing = self._timing
        if self._stems is None:
            assert piece.waveform is not None and piece.rate_hz is not None
            speech, rest = piece.waveform, np.zeros_like(piece.waveform)
            if self._separator is not None:
                speech, rest = split(piece.waveform, self._separator, mix_hz=piece.rate_hz, rate_hz=timing.rate_hz)
            tracks = {"speech": speech, "effects": rest, "music": np.zeros_like(rest)}
            origin, sound_end_s = first * self._stride, _end_s(piece.waveform, piece.rate_hz)
        else:
            tracks, origin = self._stems, 0
            sound_end_s = len(tracks["speech"]) / timing.rate_hz
        for number in range(first, first + count):
            start = number * self._stride
            start_s, end_s = start * self._frame_s, (start - origin + timing.num_frames) * self._frame_s
            place = round((start - origin) * self._frame_s * timing.rate_hz)
            cut = {name: _slice(track, place, timing.num_samples) for name, track in tracks.items()}
            if why := silence(np.sum(list(cut.values()), axis=0)):
                yield Rejected(why)
            elif end_s > sound_end_s + self._frame_s:
                yield Rejected("the sound ends before the picture")
            else:
                frames = piece.frames[start - first * self._stride :][: timing.num_frames]
                try:
                    boxes = self._mouth_boxes(start_s)
                except MediaError as error:
                    yield Rejected(reason(self._path, error))
                    continue
                yield Window(number, start_s, start_s + timing.duration_s, frames, cut["speech"], cut["effects"],
                             cut["music"], cut.get("speech_second"), boxes)  # fmt: skip

    def _mouth_boxes(self, start_s: float) -> list[list[Box]]:
        """Of a window's frames and persons."""
        if self._mouths is None:
            return []
        return self._mouths.in_file(self._path, timing=self._timing, start_s=start_s)

    def _read_stems(self) -> dict[str, np.ndarray] | None:
        """The stems beside the clip, all of one length; None where there are none. A missing one is silence."""
        paths = {name: self._path.with_name(f"{self._path.stem}.{name}.wav") for name in STEMS}
        paths = {name: path for name, path in paths.items() if path.exists()}
        if not paths:
            return None
        rate_hz = self._timing.rate_hz
        lengths = [self.duration_s, *self._sound_length()]
        stems = {}
        for name, path in paths.items():
            try:
                stems[name] = read_audio(path, rate_hz)
            except MediaError as error:
                raise Rejected(f"{path.name}: {reason(path, error)}") from error
            seconds = len(stems[name]) / rate_hz
            if all(abs(seconds - length) > self._frame_s + 1e-3 for length in lengths):
                raise Rejected(
                    f"{path.name}: {seconds:.2f} s long, the clip {lengths[0]:.2f} s; stems must fit to a frame "
                    f"({self._frame_s:.3f} s)"
                )
        longest = max(map(len, stems.values()))
        missing = [name for name in STEMS[:3] if name not in stems]
        if missing:
            self.notes.append(f"no stem for {' and '.join(missing)}: silent")
        silence = np.zeros(0, np.float32)
        names = dict.fromkeys([*STEMS[:3], *stems])
        return {name: _slice(stems.get(name, silence), 0, longest) for name in names}

    def _sound_length(self) -> list[float]:
        """Seconds of the clip's own sound, which stems may have been made from: it often ends before the picture."""
        try:
            return [len(read_audio(self._path, self._timing.rate_hz)) / self._timing.rate_hz]
        except NoAudioError:
            return []
        except MediaError as error:
            raise Rejected(reason(self._path, error)) from error


def _crop_note(height: int, width: int, timing: Timing) -> list[str]:
    """A remark where the centre crop loses much of the picture: persons that the caption names may be cut away."""
    kept = min(height * timing.width, width * timing.height) / max(height * timing.width, width * timing.height, 1)
    if kept >= CROP_REMARK:
        return []
    return [f"{width}x{height} cropped to the middle {kept:.0%} for {timing.width}x{timing.height}"]


def _slice(track: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` samples from `start` on, with silence after the track's end."""
    part = track[start : start + count]
    return np.pad(part, (0, count - len(part)))


def _end_s(waveform: np.ndarray, rate_hz: int) -> float:
    """Seconds until only zeros follow: the reader fills with them where a file's sound ends before its picture."""
    heard = np.flatnonzero(waveform)
    return (heard[-1] + 1) / rate_hz if heard.size else 0.0


def silence(sound: np.ndarray) -> str:
    """Why a sound [N] counts as silent, or nothing."""
    rms = math.sqrt(np.mean(np.square(sound, dtype=np.float64))) if len(sound) else 0.0
    return f"silent, below {20 * math.log10(SILENCE_RMS):.0f} dB" if rms < SILENCE_RMS else ""


def reason(path: Path, error: MediaError) -> str:
    """What is wrong with a file, without its path."""
    return str(error).removeprefix(f"{path}: ")
