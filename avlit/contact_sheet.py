"""Contact sheets: one picture of several clips, frames over their mel spectrograms, to judge samples at a glance."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from avlit.codecs.embedded_audio import SILENCE_POWER, mel_filters, power_spectrum


def contact_sheet(
    path: Path | str,
    clips: Sequence[np.ndarray | None],
    *,
    waveforms: Sequence[np.ndarray],
    rate_hz: int,
    labels: Sequence[str],
    columns: int = 8,
) -> None:
    """A PNG of several clips: for each its label, `columns` frames evenly spread in time, its mel spectrogram below.

    clips: uint8 [F, H, W, 3] each, or None for sound without picture; waveforms: mono [N] each at `rate_hz`. A frame
    stands over the sound of its time.
    """
    if not len(clips) == len(waveforms) == len(labels) or not clips:
        raise ValueError(f"{len(clips)} clips, {len(waveforms)} waveforms, {len(labels)} labels: one of each per clip")
    rows = [
        _sheet_row(frames, waveform, rate_hz, label, columns)
        for frames, waveform, label in zip(clips, waveforms, labels, strict=True)
    ]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    sheet.save(part, format="PNG")
    part.replace(path)


def _sheet_row(frames: np.ndarray | None, waveform: np.ndarray, rate_hz: int, label: str, columns: int) -> Image.Image:
    """Label, frames and spectrogram of one clip; frames are 128 pixels high."""
    height, sound_height, font = (128 if frames is not None else 0), 64, ImageFont.load_default(size=13)
    width = 128 if frames is None else max(1, round(frames.shape[2] * height / frames.shape[1]))
    lines = _wrapped(label, font, width=width * columns - 12, most=2)
    text_height = 17 * len(lines) + 7
    row = Image.new("RGB", (width * columns, text_height + height + sound_height + 6), "white")
    ImageDraw.Draw(row).multiline_text((6, 3), "\n".join(lines), fill="black", font=font, spacing=3)
    if frames is not None:
        shown = frames[((np.arange(columns) + 0.5) * len(frames) / columns).astype(int)]
        smooth = Image.Resampling.NEAREST if frames.shape[1] < height else Image.Resampling.LANCZOS
        for column, frame in enumerate(shown):
            row.paste(Image.fromarray(frame).resize((width, height), smooth), (column * width, text_height))
    row.paste(_mel_picture(waveform, rate_hz).resize((row.width, sound_height)), (0, text_height + height))
    return row


def label_strip(label: str, *, width: int) -> np.ndarray:
    """One line of text on white, uint8 [24, width, 3]; words that do not fit are left out."""
    font = ImageFont.load_default(size=13)
    strip = Image.new("RGB", (width, 24), "white")
    line = _wrapped(label, font, width=width - 12, most=1)[0]
    ImageDraw.Draw(strip).text((6, 3), line, fill="black", font=font)
    return np.asarray(strip)


def _wrapped(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, *, width: int, most: int) -> list[str]:
    """Words in at most `most` lines of `width` pixels, with an ellipsis where words are left out."""
    lines = [""]
    for word in label.split():
        if font.getlength(f"{lines[-1]} {word} …") > width and lines[-1]:
            if len(lines) == most:
                lines[-1] += " …"
                break
            lines.append("")
        lines[-1] += word if not lines[-1] else f" {word}"
    return lines


def _mel_picture(waveform: np.ndarray, rate_hz: int) -> Image.Image:
    """Log-mel spectrogram, one pixel a frame and band, low bands at the bottom; black is -70 dB, white full scale."""
    fft_size = 2 ** round(math.log2(rate_hz * 0.05))
    power = power_spectrum(torch.from_numpy(waveform.astype(np.float32)), fft_size=fft_size, hop=fft_size // 4)
    mel = (power @ mel_filters(num_mels=64, fft_size=fft_size, rate_hz=rate_hz)).numpy()
    level = np.log1p(mel / SILENCE_POWER) / math.log1p(1 / SILENCE_POWER)  # [M, 64] in [0, 1]
    stops = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)])  # dark to bright
    colors = [np.interp(level.T[::-1], np.linspace(0, 1, len(stops)), stops[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(colors, axis=-1).astype(np.uint8))
