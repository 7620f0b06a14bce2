"""The controllability study: one thing exchanged, everything else and the seed kept, the clips side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avlit.commands.generation import Generator
from avlit.commands.plan import Plan
from avlit.commands.request import FILE_KEYS, Request
from avlit.commands.soundtrack import MIX_RATE_HZ, open_soundtrack
from avlit.contact_sheet import contact_sheet, label_strip
from avlit.errors import ConfigError, UserError
from avlit.media import MP4Writer, write_sound
from avlit.sound import resample

PROMPT_KEYS = ("prompt", "audio_prompt")
VARIED_KEYS = (*PROMPT_KEYS, *FILE_KEYS)
SUFFIXES = {"video": ".mp4", "depth": ".mp4", "pose": ".mp4", "reference_image": ".png"}
"""Of the files that vary, in an example; others hold sound."""
GRID_COLUMNS = 4
TILE = 256
"""Pixels that the shorter side of a clip in the grid has at least."""
SHEET_COLUMNS = 8
SHEET_RATE_HZ = 16000


@dataclass(frozen=True)
class Variant:
    """One of the clips: the name of its file, what stands over it, and its request."""

    name: str
    label: str
    request: Request


def variants(request: Request, key: str, text: str) -> list[Variant]:
    """The request once for each of the values of `text`: files divided by commas, prompts by `|`.

    ConfigError for a key that cannot vary or fewer than two values.
    """
    if key not in VARIED_KEYS:
        raise ConfigError(f"vary={key}: must be one of {', '.join(VARIED_KEYS)}")
    divider = "|" if key in PROMPT_KEYS else ","
    values = [value.strip() for value in text.split(divider)]
    if len(values) < 2 or not all(values):
        example = (
            f"{key}='a cat | a dog'"
            if key in PROMPT_KEYS
            else f"{key}=a{SUFFIXES.get(key, '.wav')},b{SUFFIXES.get(key, '.wav')}"
        )
        raise ConfigError(f"{key}={text}: vary={key} needs two values or more, for example {example}")
    if key in PROMPT_KEYS:
        return [Variant(f"{n:02d}-{key}", text, request.with_text(key, text)) for n, text in enumerate(values)]
    return [
        Variant(f"{n:02d}-{Path(value).stem}", f"{key}={Path(value).name}", request.with_file(key, Path(value)))
        for n, value in enumerate(values)
    ]


def refuse_unlike(made: Sequence[tuple[Variant, Plan]], *, key: str) -> None:
    """Raise UserError for clips that cannot stand side by side because videos of other lengths are given."""
    lengths = {plan.duration_s: variant.label for variant, plan in made}
    if len(lengths) > 1:
        shown = ", ".join(f"{label} {seconds:.2f} s" for seconds, label in lengths.items())
        raise UserError(f"vary={key}: the clips would differ in length: {shown}; give duration_s={min(lengths):.3f}")


def write_grid(
    generator: Generator,
    made: Sequence[tuple[Variant, Plan]],
    folder: Path,
    *,
    key: str,
    on_step: Callable[[], None] | None = None,
) -> list[Path]:
    """An MP4 of each variant with its own sound, `grid.mp4` with all of them, and a contact sheet; returns the paths.

    folder: exists. The grid sounds of the tracks that all variants share; it is silent where each has a sound of its
    own that was generated. All are sampled window by window together, so that memory does not grow with their length
    but for the contact sheet's sound. Of sound alone there are WAVs and the contact sheet.
    """
    if not generator.abilities.makes_video:
        return _write_sounds(generator, made, folder, on_step=on_step)
    plans, timing = [plan for _, plan in made], generator.timing
    shared_paths = {name: path for name, path in plans[0].soundtrack.paths.items() if name != key}
    shared = open_soundtrack(shared_paths, duration_s=plans[0].num_frames / timing.fps)
    layout = Layout.of([variant.label for variant, _ in made], height=timing.height, width=timing.width)
    paths = [folder / f"{variant.name}.mp4" for variant, _ in made]
    grid_path, sheet_path = folder / "grid.mp4", folder / "contact_sheet.png"
    shown = ((np.arange(SHEET_COLUMNS) + 0.5) * plans[0].num_frames / SHEET_COLUMNS).astype(int)
    stills: list[list[np.ndarray]] = [[] for _ in made]
    sounds: list[list[np.ndarray]] = [[] for _ in made]
    with ExitStack() as stack:
        movies = [stack.enter_context(generator.writer(plan, path)) for plan, path in zip(plans, paths, strict=True)]
        rate_hz = MIX_RATE_HZ if shared_paths else None
        grid = stack.enter_context(MP4Writer(grid_path, size=layout.size, fps=timing.fps, rate_hz=rate_hz, scale=1))
        done = 0
        for window, pieces in zip(
            plans[0].windows,
            zip(*(generator.pieces(plan, on_step=on_step) for plan in plans), strict=True),
            strict=True,
        ):
            for number, piece in enumerate(pieces):
                movies[number].write(piece.frames, piece.waveform)
                stills[number] += [piece.frames[i - done] for i in shown if done <= i < done + window.count]
                silence = np.zeros(round(window.count / timing.fps * MIX_RATE_HZ), np.float32)
                sound = silence if piece.waveform is None else piece.waveform
                sounds[number].append(resample(sound, MIX_RATE_HZ, SHEET_RATE_HZ))
            first, end = (round(frame / timing.fps * MIX_RATE_HZ) for frame in (done, done + window.count))
            grid.write(
                layout.tiled([piece.frames for piece in pieces]),
                shared.mix(first=first, count=end - first) if shared_paths else None,
            )
            done += window.count
    contact_sheet(
        sheet_path,
        [np.stack(each) for each in stills],
        waveforms=[np.concatenate(each) for each in sounds],
        rate_hz=SHEET_RATE_HZ,
        labels=[variant.label for variant, _ in made],
        columns=SHEET_COLUMNS,
    )
    return [*paths, grid_path, sheet_path]


def _write_sounds(
    generator: Generator,
    made: Sequence[tuple[Variant, Plan]],
    folder: Path,
    *,
    on_step: Callable[[], None] | None,
) -> list[Path]:
    paths, sounds = [folder / f"{variant.name}.wav" for variant, _ in made], []
    for (_, plan), path in zip(made, paths, strict=True):
        (piece,) = generator.pieces(plan, on_step=on_step)
        assert piece.waveform is not None
        write_sound(path, piece.waveform, rate_hz=generator.rate_hz)
        sounds.append(piece.waveform)
    sheet_path = folder / "contact_sheet.png"
    labels = [variant.label for variant, _ in made]
    contact_sheet(sheet_path, [None] * len(made), waveforms=sounds, rate_hz=generator.rate_hz, labels=labels)
    return [*paths, sheet_path]


@dataclass(frozen=True)
class Layout:
    """Labelled clips in rows of up to four. strips: uint8 [24, width, 3] each, what stands over each clip."""

    strips: Sequence[np.ndarray]
    scale: int
    height: int
    width: int

    @classmethod
    def of(cls, labels: Sequence[str], *, height: int, width: int) -> Layout:
        """height, width: pixels of one clip."""
        scale = max(1, -(-TILE // min(height, width)))
        return cls([label_strip(label, width=width * scale) for label in labels], scale, height, width)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the grid in pixels."""
        columns = min(len(self.strips), GRID_COLUMNS)
        rows = -(-len(self.strips) // columns)
        return rows * (self.height * self.scale + self.strips[0].shape[0]), columns * self.width * self.scale

    def tiled(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Clips uint8 [F, H, W, 3], one a label -> the grid's frames, uint8 [F, *size, 3]; what is free stays white."""
        frames = np.full((len(clips[0]), *self.size, 3), 255, np.uint8)
        for number, (clip, strip) in enumerate(zip(clips, self.strips, strict=True)):
            row, column = divmod(number, GRID_COLUMNS)
            top, left = row * (self.height * self.scale + strip.shape[0]), column * self.width * self.scale
            large = clip.repeat(self.scale, axis=1).repeat(self.scale, axis=2)
            frames[:, top : top + strip.shape[0], left : left + strip.shape[1]] = strip
            top += strip.shape[0]
            frames[:, top : top + large.shape[1], left : left + large.shape[2]] = large
        return frames
