"""AV-Align: do peaks of the sound's onsets and of the picture's motion meet? (TempoTokens, Section 4; MTV, Section 7.3)

A peak in one modality counts where the other has one within a frame of it. MTV finds that real films score lowest.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Reading
from avlit.metrics.metric import Measure, Meter, Metric, Package, Tools
from avlit.sound import resample

RATE_HZ, FFT_SIZE, HOP, NUM_MELS = 22050, 2048, 512, 128
"""What librosa, with which AV-Align is defined, hears by default."""

PEAK_BEFORE, MEAN_BEFORE, MEAN_AFTER, WAIT, DELTA = 1, 4, 5, 1, 0.07
"""An onset is the highest of itself and so many hops before it, stands out by DELTA from the mean of the hops around
it, and is more than WAIT hops after the last one: librosa's defaults at this rate."""

OPENCV = Package("cv2", "uv pip install 'opencv-python-headless<5'")


def onset_strength(waveform: np.ndarray) -> np.ndarray:
    """How much louder each hop is than the one before, mean over mel bands in dB, of a waveform [N] at 22050 Hz, [M].

    librosa.onset.onset_strength with its defaults.
    """
    filters = mel_filter_bank(FFT_SIZE // 2 + 1, NUM_MELS, 0.0, RATE_HZ / 2, RATE_HZ, norm="slaney", mel_scale="slaney")
    heard = spectrogram(
        waveform, window_function(FFT_SIZE, "hann"), FFT_SIZE, HOP, fft_length=FFT_SIZE, power=2.0, pad_mode="constant",
        mel_filters=filters, mel_floor=1e-10, log_mel="dB", db_range=80.0,
    )  # fmt: skip
    rise = np.maximum(0, heard[:, 1:] - heard[:, :-1]).mean(0)  # [M - 1]
    return np.pad(rise, (1 + FFT_SIZE // (2 * HOP), 0))[: heard.shape[1]]


def audio_peaks(waveform: np.ndarray, rate_hz: int) -> list[float]:
    """When sounds set in, in seconds, of a waveform [N] at any rate; librosa.onset.onset_detect with its defaults."""
    heard = resample(waveform, rate_hz, RATE_HZ)
    if len(heard) < 2:
        return []
    strength = onset_strength(heard)
    strength = strength - strength.min()
    if not strength.max() > 0:
        return []
    strength = strength / strength.max()
    found: list[int] = []
    for place, value in enumerate(strength):
        around = strength[max(0, place - MEAN_BEFORE) : place + MEAN_AFTER]
        is_highest = value >= strength[max(0, place - PEAK_BEFORE) : place + 1].max()
        if is_highest and value >= around.mean() + DELTA and (not found or place > found[-1] + WAIT):
            found.append(place)
    return [place * HOP / RATE_HZ for place in found]


def video_peaks(frames: np.ndarray, fps: float) -> list[float]:
    """When motion is greatest, in seconds: local maxima of the mean length of Farnebäck's flow between frames.

    frames: uint8 [F, H, W, 3]. A flow belongs to the later of its two frames.
    """
    cv2 = importlib.import_module("cv2")
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    lengths = []
    for before, after in pairwise(grey):
        still = np.zeros((*before.shape, 2), np.float32)
        flow = cv2.calcOpticalFlowFarneback(before, after, still, 0.5, 3, 15, 3, 5, 1.2, 0)
        lengths.append(float(np.linalg.norm(flow, axis=-1).mean()))
    motion = [*lengths[:1], *lengths]
    return [n / fps for n in range(1, len(motion) - 1) if motion[n - 1] < motion[n] > motion[n + 1]]


def peaks_met(heard: Sequence[float], seen: Sequence[float], *, fps: float) -> float:
    """Peaks that meet within a frame, each once, over all peaks (intersection over union), in [0, 1].

    NaN where there is no peak at all.
    """
    free = list(seen)
    met = 0
    for time in heard:
        near = next((peak for peak in free if abs(peak - time) < 1 / fps), None)
        if near is not None:
            free.remove(near)
            met += 1
    union = len(heard) + len(seen) - met
    return met / union if union else math.nan


def _open(tools: Tools) -> Measure:
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None and clip.sound is not None
        value = peaks_met(
            audio_peaks(clip.sound.waveform, clip.rate_hz), video_peaks(clip.frames, clip.fps), fps=clip.fps
        )
        return {} if math.isnan(value) else {"AV-Align": value}

    return measure


METRICS = (
    Metric(
        "AV-Align",
        "peaks of sound onsets and of optical flow that meet within a frame, over all peaks",
        "higher", 0, 1, "",
        "TempoTokens (Yariv et al. 2023), Section 4; MTV, Section 7.3",
        Meter("av_align", _open, ("frames", "sound"), (OPENCV,)),
    ),
)  # fmt: skip
