"""The same held-out clips of several runs, beside the page with their spectrograms."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters, digits

import av
import av.error
import numpy as np
from PIL import Image
from scipy.signal import spectrogram

from avlit.comparison.subject import Subject
from avlit.errors import UserError
from avlit.sound import to_mono

STEP_FOLDER = re.compile(r"step-(\d{8})")
CLIP_NAME = re.compile(r"\d+-(.+)\.(mp4|wav)")
PICTURE_HEIGHT, PICTURE_WIDTH, FLOOR_DB = 96, 480, -80.0
LOWEST_HZ = 50.0


@dataclass(frozen=True)
class Clip:
    """A clip of one run. file, picture: names in the media folder, "" where there is none; problem: why not."""

    letter: str
    step: int
    file: str = ""
    picture: str = ""
    rate_hz: int = 0
    problem: str = ""

    @property
    def is_sound(self) -> bool:
        return self.file.endswith(".wav")


@dataclass(frozen=True)
class ClipRow:
    """One held-out clip: what each run made for its conditions, None where a run has none."""

    key: str
    clips: tuple[Clip | None, ...]


def find_clips(subjects: Sequence[Subject], folder: Path, *, count: int) -> list[ClipRow]:
    """The clips that most runs have, each from its run's newest samples, copied into `folder` with spectrograms.

    count: clips at most. UserError: the folder cannot be written to.
    """
    newest = [newest_clips(subject) for subject in subjects]
    keys = list(dict.fromkeys(key for _, files in newest for key in files))
    having = {key: sum(key in files for _, files in newest) for key in keys}
    shown = sorted(keys, key=lambda key: -having[key])[:count]
    if not shown:
        return []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [
            ClipRow(
                key,
                tuple(
                    taken(subject, step, files[key], folder) if key in files else None
                    for subject, (step, files) in zip(subjects, newest, strict=True)
                ),
            )
            for key in shown
        ]
    except OSError as error:
        raise UserError(f"{folder}: the clips cannot be copied there ({error.strerror})") from error


def newest_clips(subject: Subject) -> tuple[int, dict[str, Path]]:
    """The step of a run's newest samples, and clip -> file; (0, {}) where it has made none."""
    for folder in sorted(subject.run.samples_dir.glob("step-*"), reverse=True):
        step = STEP_FOLDER.fullmatch(folder.name)
        found = {name[1]: path for path in sorted(folder.glob("*")) if (name := CLIP_NAME.fullmatch(path.name))}
        if step and found:
            return int(step[1]), found
    return 0, {}


def taken(subject: Subject, step: int, path: Path, folder: Path) -> Clip:
    """A clip and its spectrogram in `folder`; a file that cannot be read is named in place of it."""
    safe = "".join(letter if letter in f"{ascii_letters}{digits}-_" else "_" for letter in path.stem)
    name = f"{subject.letter}-{safe}"
    try:
        found = read_sound(path)
    except av.error.FFmpegError as error:
        return Clip(subject.letter, step, problem=f"cannot be read: {error.strerror}")
    shutil.copyfile(path, folder / f"{name}{path.suffix}")
    if found is None:
        return Clip(subject.letter, step, f"{name}{path.suffix}", problem="has no sound")
    waveform, rate_hz = found
    draw_spectrogram(waveform, rate_hz).save(folder / f"{name}.png")
    return Clip(subject.letter, step, f"{name}{path.suffix}", f"{name}.png", rate_hz)


def read_sound(path: Path) -> tuple[np.ndarray, int] | None:
    """A clip's sound, float32 [N] mono in [-1, 1], and its rate; None where it has none.

    Without `avlit.media`, which imports torch: that alone would take as long as all the rest of a comparison.
    """
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        pieces = [to_mono(frame) for frame in container.decode(stream)]
    return (np.concatenate(pieces), stream.codec_context.sample_rate) if pieces else None


def draw_spectrogram(waveform: np.ndarray, rate_hz: int) -> Image.Image:
    """Mono [N] in [-1, 1] -> level over time and pitch, from 50 Hz to half the rate on a logarithmic axis, -80 to 0 dB
    below the loudest; dark where it is silent.
    """
    window = 2 ** round(np.log2(rate_hz * 0.04))
    if len(waveform) < window:
        waveform = np.pad(waveform, (0, window - len(waveform)))
    frequencies, _, power = spectrogram(
        waveform, rate_hz, nperseg=window, noverlap=window * 3 // 4, mode="psd", scaling="spectrum"
    )  # power [B, T]
    level = 10 * np.log10(np.maximum(power, 1e-12))
    level = np.clip((level - max(float(level.max()), -60.0)) / -FLOOR_DB + 1, 0, 1)
    wanted = np.geomspace(rate_hz / 2, LOWEST_HZ, PICTURE_HEIGHT)
    rows = np.clip(np.searchsorted(frequencies, wanted), 0, len(frequencies) - 1)
    stops = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)])  # dark to bright
    places = np.linspace(0, 1, len(stops))
    colors = np.stack([np.interp(level[rows], places, stops[:, channel]) for channel in range(3)], axis=-1)
    picture = Image.fromarray(colors.astype(np.uint8)).resize(
        (PICTURE_WIDTH, PICTURE_HEIGHT), Image.Resampling.BILINEAR
    )
    return picture.quantize(64)
