"""SyncNet's two numbers of lip sync: how far lips and sound are apart, and how much farther at other lags.

SyncNet (Chung and Zisserman 2016) and its evaluation as syncnet_python releases them, under its names of weights;
`syncnet_v2.model` was not at hand when this was written. Its confidence is Sync-C, or LSE-C; its distance Sync-D, or
LSE-D (Prajwal et al. 2020). Faces are found, followed and cut out as there, see `face_tracks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor, nn
from torch.nn import functional as F

from avlit.metrics.clip import Clip
from avlit.metrics.estimate import Reading
from avlit.metrics.face_tracks import S3FD, S3FD_WEIGHTS, cut_out, follow
from avlit.metrics.metric import Measure, Meter, Metric, Tools, Weights
from avlit.metrics.speech import RATE_HZ, heard_at
from avlit.metrics.state_file import load_weights

FPS = 25
FURTHEST = 15
"""Frames of lag that are tried."""
WINDOW, SOUND_WINDOW = 5, 20
"""Frames, and steps of 10 ms, that are embedded together."""
PER_FRAME = 4
"""Steps of 10 ms."""
CHUNK = 20

FFT, SPAN, STEP, FILTERS, CEPSTRA, LIFTER, EMPHASIS = 512, 400, 160, 26, 13, 22, 0.97


class SyncNet(nn.Module):
    """Five frames of a face and the 0.2 s of sound with them, each -> [1024]; where they belong together, near."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_layer2(1, 64), nn.MaxPool2d(1, 1),
            *_layer2(64, 192), nn.MaxPool2d(3, (1, 2)),
            *_layer2(192, 384), *_layer2(384, 256), *_layer2(256, 256), nn.MaxPool2d(3, 2),
            nn.Conv2d(256, 512, (5, 4)), nn.BatchNorm2d(512), nn.ReLU(),
        )  # fmt: skip
        self.netcnnlip = nn.Sequential(
            *_layer3(3, 96, (5, 7, 7), stride=2, padding=0), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_layer3(96, 256, (1, 5, 5), stride=2), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *_layer3(256, 256), *_layer3(256, 256), *_layer3(256, 256), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_layer3(256, 512, (1, 6, 6), padding=0),
        )  # fmt: skip
        self.netfcaud, self.netfclip = (
            nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024)) for _ in range(2)
        )

    def lips(self, faces: Tensor) -> Tensor:
        """Faces [3, F, 224, 224], BGR from 0 to 255 -> embeddings [F - 4, 1024] of each five in a row."""
        return self.netfclip(self.netcnnlip(faces[None])[0, :, :, 0, 0].T)  # [512, F - 4] inside

    def sound(self, cepstra: Tensor) -> Tensor:
        """Parts of a sound's cepstra [N, 13, 20] -> embeddings [N, 1024]."""
        return self.netfcaud(self.netcnnaud(cepstra[:, None]).flatten(1))


def _layer2(inside: int, outside: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU()


def _layer3(
    inside: int, outside: int, kernel: tuple[int, int, int] = (1, 3, 3), *, stride: int = 1, padding: int = 1
) -> tuple[nn.Module, ...]:
    convolution = nn.Conv3d(inside, outside, kernel, (1, stride, stride), (0, padding, padding))
    return convolution, nn.BatchNorm3d(outside), nn.ReLU()


def cepstra(sound: np.ndarray) -> np.ndarray:
    """Sound [N] at 16 kHz, as 16-bit numbers -> 13 mel-frequency cepstra of each 10 ms, [13, M].

    As python_speech_features' `mfcc` at its defaults: 25 ms without a window, 26 filters up to 8 kHz, the first
    replaced by the log of the energy.
    """
    sound = np.append(sound[:1], sound[1:] - EMPHASIS * sound[:-1])
    count = 1 + max(0, -(-(len(sound) - SPAN) // STEP))
    sound = np.pad(sound, (0, max(0, (count - 1) * STEP + SPAN - len(sound))))
    parts = np.lib.stride_tricks.sliding_window_view(sound, SPAN)[::STEP][:count]  # [M, 400]
    power = np.square(np.abs(np.fft.rfft(parts, FFT))) / FFT  # [M, 257]
    least = np.finfo(float).eps
    heard = np.log(np.maximum(power @ mel_filters().T, least))  # [M, 26]
    lifted = 1 + LIFTER / 2 * np.sin(np.pi * np.arange(CEPSTRA) / LIFTER)
    found = np.asarray(dct(heard, type=2, axis=1, norm="ortho"))[:, :CEPSTRA] * lifted  # [M, 13]
    found[:, 0] = np.log(np.maximum(power.sum(1), least))
    return found.T


def mel_filters() -> np.ndarray:
    """Triangles between whole bins of the spectrum, equally far apart in mel, [26, 257]."""
    top = 2595 * np.log10(1 + RATE_HZ / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, FILTERS + 2) / 2595) - 1)
    edges = np.floor((FFT + 1) * hertz / RATE_HZ)
    bins = np.arange(FFT // 2 + 1)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.where(bins < edges[1:-1, None], np.maximum(0, rising), np.maximum(0, falling))


def at_25_fps(frames: np.ndarray, fps: float) -> np.ndarray:
    """Frames repeated or left out as FFmpeg does it, [F', H, W, 3]."""
    ticks = np.floor(np.arange(len(frames)) * FPS / fps + 0.5)
    shown = np.arange(max(1, round(len(frames) * FPS / fps)))
    return frames[np.maximum(0, np.searchsorted(ticks, shown, side="right") - 1)]


def lag_distances(lips: Tensor, sound: Tensor) -> Tensor:
    """Mean distance of lips [N, D] and sound [N, D] that is -15 to 15 frames later, [31]; past the ends it is zero."""
    around = F.pad(sound, (0, 0, FURTHEST, FURTHEST)).unfold(0, len(lips), 1)  # [31, D, N]
    return (lips.T - around + 1e-6).norm(dim=1).mean(1)


def confidence(distances: Tensor) -> tuple[float, float, int]:
    """Distances by lag [31] -> confidence (median less least), least distance, frames that the lips are late there."""
    least, place = distances.min(0)
    return float(distances.median() - least), float(least), FURTHEST - int(place)


@torch.no_grad()
def compare(network: SyncNet, faces: np.ndarray, sound: np.ndarray) -> tuple[float, float, int] | None:
    """Confidence, distance and lag of one face, uint8 [F, 224, 224, 3] at 25 fps, with its sound [N] at 16 kHz as
    16-bit numbers; None where either is too short."""
    count = min(len(faces), len(sound) * FPS // RATE_HZ) - WINDOW
    if count < 2:
        return None
    device = next(network.parameters()).device
    shown = torch.from_numpy(faces[..., ::-1].copy()).permute(3, 0, 1, 2)  # [3, F, 224, 224]
    parts = torch.from_numpy(cepstra(sound.astype(float))).float().unfold(1, SOUND_WINDOW, PER_FRAME)  # [13, M', 20]
    lips, heard = [], []
    for at in range(0, count, CHUNK):
        until = min(at + CHUNK, count)
        lips.append(network.lips(shown[:, at : until + WINDOW - 1].float().to(device)).cpu())
        heard.append(network.sound(parts[:, at:until].transpose(0, 1).to(device)).cpu())
    return confidence(lag_distances(torch.cat(lips), torch.cat(heard)))


def _open(tools: Tools) -> Measure:
    network, finder = load_weights(SyncNet(), SYNCNET, tools), load_weights(S3FD(), S3FD_WEIGHTS, tools)

    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.frames is not None and clip.sound is not None
        frames = at_25_fps(clip.frames, clip.fps)
        sound = np.clip(np.round(heard_at(clip.sound) * 32768), -32768, 32767)
        found = []
        for track in follow([finder.find(frame) for frame in frames]):
            start, length = (number * RATE_HZ // FPS for number in (track.first, len(track.boxes)))
            if one := compare(network, cut_out(frames, track), sound[start : start + length]):
                found.append(one)
        if not found:
            return {}
        sure, distance, lag = max(found)  # of several faces, the one that speaks
        return {"Sync-C": sure, "LSE-C": sure, "Sync-D": distance, "LSE-D": distance, "sync_lag": float(lag)}

    return measure


SYNCNET = Weights("syncnet", "SyncNet as syncnet_python releases it (syncnet_v2.model), or safetensors")
METER = Meter("syncnet", _open, ("frames", "sound"), (SYNCNET, S3FD_WEIGHTS))
SYNC = "MTV, Section 7.3; UniTalking, Section 5.4; MMControl, Section 4.1"
LSE = "JoVA, Section 4.1; Wav2Lip (Prajwal et al. 2020)"

METRICS = (
    Metric("Sync-C", "confidence of lip sync, by SyncNet", "higher", 0, inf, "", SYNC, METER),
    Metric("Sync-D", "distance of lips and sound, by SyncNet", "lower", 0, inf, "", SYNC, METER),
    Metric("LSE-C", "confidence of lip sync, by SyncNet", "higher", 0, inf, "", LSE, METER),
    Metric("LSE-D", "distance of lips and sound, by SyncNet", "lower", 0, inf, "", LSE, METER),
    Metric(
        "sync_lag", "by how much lips are late where SyncNet is surest", "none", -FURTHEST, FURTHEST, "frames",
        "SyncNet (Chung and Zisserman 2016)", METER,
    ),
)  # fmt: skip
