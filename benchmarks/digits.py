"""Judges of spoken digits: which digit a sound says and in whose voice, learnt from real recordings.

`python -m benchmarks.digits [run=RUN …] [folder=../shared/media/digits] [clips=240] [duration_s=0.64] [seed=0]`:
accuracy of both judges on held-out real takes, as they are and after the embedded codec, which bounds what generated
speech can reach; then on digits that each run of `unitalking_stage1` speaks, in the voices of held-out takes.
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from avlit.batch import AVBatch
from avlit.codecs.embedded_audio import EmbeddedAudioCodec, mel_filters, power_spectrum
from avlit.commands.assembly import build_encoders
from avlit.commands.generation import load_trained, run_config
from avlit.commands.sample import newest_checkpoint
from avlit.errors import UserError
from avlit.media import read_audio
from avlit.runs import find_run
from avlit.sound import fit, gain_to_peak, resample
from data.captions import Turn, audio_caption

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

TAKE_NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")
JUDGED_TAKES, HELDOUT_TAKES = range(10, 35), range(35, 40)
"""Takes that train the judges and takes that test them; those below 10 are the models' own."""

RATE_HZ, FFT_SIZE, HOP, NUM_MELS, NUM_MEL_FRAMES = 8000, 256, 80, 40, 100
"""What a judge hears: 40 log-mel bands up to 4 kHz, as the recordings have, 100 a second for one second."""

FLOOR = 1e-5
"""Power below a clip's loudest band that counts as silence (50 dB): judges know neither level nor recording noise."""

CODEC_HZ = EmbeddedAudioCodec.rate_hz


@dataclass(frozen=True)
class Take:
    """One recording: waveform float32 [N] in [-1, 1] at 16 kHz."""

    digit: int
    speaker: str
    number: int
    waveform: np.ndarray


def read_takes(folder: Path | str, numbers: Sequence[int], *, rate_hz: int = CODEC_HZ) -> list[Take]:
    """The recordings `{digit}_{speaker}_{take}.wav` of `folder` whose take is one of `numbers`, ordered by name."""
    takes = []
    for path in sorted(Path(folder).glob("*.wav")):
        name = TAKE_NAME.fullmatch(path.name)
        if name and int(name[3]) in numbers:
            takes.append(Take(int(name[1]), name[2], int(name[3]), read_audio(path, rate_hz)))
    if not takes:
        raise UserError(
            f"folder={folder}: has no recordings named {{digit}}_{{speaker}}_{{take}}.wav with takes "
            f"{min(numbers)} to {max(numbers)}; give the folder of spoken digits"
        )
    return takes


def through_codec(waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Sounds [N] at 16 kHz as the embedded codec gives them back, each as long as it was."""
    codec, heard = EmbeddedAudioCodec(), []
    for start in range(0, len(waveforms), 64):
        group = waveforms[start : start + 64]
        count = max(map(len, group))
        decoded = codec.decode(codec.encode(torch.from_numpy(np.stack([fit(wave, count) for wave in group]))))
        heard += [row[: len(wave)].numpy() for row, wave in zip(decoded, group, strict=True)]
    return heard


def hear(waveforms: Tensor) -> Tensor:
    """[B, N] at 8 kHz -> log-mel [B, 40, 100]: 0 at the loudest band of a clip, -1 at 50 dB below it and in silence.

    The first second counts; a shorter sound is followed by silence.
    """
    count = NUM_MEL_FRAMES * HOP
    waveforms = F.pad(waveforms[:, :count], (0, max(0, count - waveforms.shape[1])))
    filters = mel_filters(num_mels=NUM_MELS, fft_size=FFT_SIZE, rate_hz=RATE_HZ)
    power = power_spectrum(waveforms, fft_size=FFT_SIZE, hop=HOP)[:, :NUM_MEL_FRAMES] @ filters  # [B, T, 40]
    power = power / power.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return -(power + FLOOR).log10().transpose(1, 2) / math.log10(FLOOR)


class Listener(nn.Sequential):
    """Log-mel [B, 40, 100] -> logits [B, classes]: three convolutions, mean and maximum over time."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            *(nn.Conv1d(NUM_MELS, 96, 5, padding=2), nn.BatchNorm1d(96), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.Conv1d(96, 96, 5, padding=2), nn.BatchNorm1d(96), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.Conv1d(96, 96, 5, padding=2), nn.BatchNorm1d(96), nn.ReLU()),
            *(nn.AdaptiveAvgPool1d(5), nn.Flatten(), nn.Dropout(0.4), nn.Linear(480, num_classes)),
        )


def vary(heard: Tensor, generator: torch.Generator) -> Tensor:
    """Log-mel [B, 40, 100] as other recordings might have it: moved in time, tilted, noisy, with holes."""
    moved = []
    for row, shift in zip(heard, torch.randint(-8, 9, (len(heard),), generator=generator).tolist(), strict=True):
        moved.append(F.pad(row, (max(0, shift), max(0, -shift)), value=-1.0)[:, max(0, -shift) :][:, :NUM_MEL_FRAMES])
    heard = torch.stack(moved)
    slope = torch.linspace(-1, 1, NUM_MELS)[None, :, None]
    tilt = 0.05 * torch.randn(len(heard), 1, 1, generator=generator) * slope
    heard = (heard + tilt + 0.04 * torch.randn(heard.shape, generator=generator)).clamp_min(-1.0)
    for axis, widest in ((1, 6), (2, 10)):
        width = torch.randint(0, widest, (len(heard), 1), generator=generator)
        first = torch.randint(0, heard.shape[axis], (len(heard), 1), generator=generator)
        place = torch.arange(heard.shape[axis])[None]
        hole = (place >= first) & (place < first + width)
        heard = heard.masked_fill(hole.unsqueeze(3 - axis), -1.0)
    return heard


def train_listener(heard: Tensor, labels: Tensor, num_classes: int, *, seed: int, epochs: int = 20) -> Listener:
    """A listener for log-mel sounds [M, 40, 100] with labels [M]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        listener = Listener(num_classes)
        optimizer = torch.optim.AdamW(listener.parameters(), 2e-3, weight_decay=0.05)
        steps = epochs * -(-len(labels) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(labels), generator=generator).split(64):
                logits = listener(vary(heard[rows], generator))
                loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return listener.eval()


@dataclass(frozen=True)
class Judges:
    """Who says what: two networks that judge waveforms, trained on real recordings and on their way through the codec.

    speakers: names, in the order of the second network's classes.
    """

    digits: Listener
    voices: Listener
    speakers: tuple[str, ...]

    @classmethod
    def train(cls, folder: Path | str, *, seed: int = 0) -> "Judges":
        """Judges of the speakers of `folder`, trained on takes 10 to 34 alone."""
        takes = read_takes(folder, JUDGED_TAKES)
        speakers = tuple(sorted({take.speaker for take in takes}))
        raw = [take.waveform for take in takes]
        # the codec's silence hides what is soft, so a voice differs with its level: judges are to know both
        kinds = (raw, through_codec(raw), through_codec([waveform * gain_to_peak(waveform, 0.7) for waveform in raw]))
        heard = torch.cat([hear(_at_rate(waveforms)) for waveforms in kinds])
        digits = torch.tensor([take.digit for take in takes] * len(kinds))
        voices = torch.tensor([speakers.index(take.speaker) for take in takes] * len(kinds))
        return cls(
            digits=train_listener(heard, digits, 10, seed=seed),
            voices=train_listener(heard, voices, len(speakers), seed=seed + 1),
            speakers=speakers,
        )

    @torch.no_grad()
    def __call__(self, waveforms: Sequence[np.ndarray], *, rate_hz: int = CODEC_HZ) -> tuple[list[int], list[str]]:
        """Sounds float32 [N] in [-1, 1] -> digit and speaker of each."""
        heard = hear(_at_rate(waveforms, rate_hz=rate_hz))
        voices = self.voices(heard).argmax(1).tolist()
        return self.digits(heard).argmax(1).tolist(), [self.speakers[voice] for voice in voices]

    def score(self, waveforms: Sequence[np.ndarray], takes: Sequence[Take]) -> tuple[float, float]:
        """Shares of sounds at 16 kHz whose digit and whose speaker are judged to be those of `takes`."""
        digits, speakers = self(waveforms)
        return (
            float(np.mean([digit == take.digit for digit, take in zip(digits, takes, strict=True)])),
            float(np.mean([speaker == take.speaker for speaker, take in zip(speakers, takes, strict=True)])),
        )


def _at_rate(waveforms: Sequence[np.ndarray], *, rate_hz: int = CODEC_HZ) -> Tensor:
    """Sounds [N] of any lengths -> [B, 8000]: the first second at the judges' rate."""
    return torch.from_numpy(np.stack([fit(resample(wave, rate_hz, RATE_HZ), RATE_HZ) for wave in waveforms]))


@torch.no_grad()
def speak(word: str, references: Sequence[Take], digits: Sequence[int], *, duration_s: float) -> list[np.ndarray]:
    """Digits spoken by the newest averaged weights of a run, clip i in the voice of references[i]: [N] at its rate."""
    run = find_run(Path("runs"), word)
    config = run_config(run, [])
    module, encoders = load_trained(config, newest_checkpoint(run, config)), build_encoders(config)
    codec = encoders.audio
    if codec is None or not encoders.reference_tokens:
        raise UserError(f"run={word}: generates no speech; give a run of recipe=unitalking_stage1")
    count = encoders.reference_tokens
    length = codec.encode(torch.zeros(1, round(duration_s * codec.rate_hz))).shape[1]
    spoken = []
    for start in range(0, len(digits), 30):
        group = range(start, min(start + 30, len(digits)))
        captions = tuple(audio_caption([Turn(WORDS[digits[i]])]) for i in group)  # as `just prepare` writes them
        text = [encoders.text.encode(caption) for caption in captions]
        raw = [resample(references[i].waveform, CODEC_HZ, codec.rate_hz) for i in group]
        voices = [voice * gain_to_peak(voice, encoders.peak) for voice in raw]
        latents = [codec.encode(torch.from_numpy(voice)[None])[0, :count] for voice in voices]
        batch = AVBatch(
            keys=tuple(f"clip {i}" for i in group),
            subsets=("digits",) * len(group),
            captions=captions,
            duration_s=duration_s,
            step=0,
            slots=tuple(group),
            text=pad_sequence(text, batch_first=True),
            text_lengths=tuple(len(each) for each in text),
            audio_latents=torch.zeros(len(group), length, codec.channels),
            reference=torch.stack([F.pad(each, (0, 0, 0, count - len(each))) for each in latents]),
            has_reference=(True,) * len(group),
        ).to(module.device)
        made = module.sample(batch, seeds=list(group), settings=config.sample)
        assert made.audio is not None
        spoken += list(codec.decode(made.audio.float()).cpu().numpy())
    return [resample(waveform, codec.rate_hz, CODEC_HZ) for waveform in spoken]


def main(words: Sequence[str]) -> None:
    """Train judges, print what they reach on held-out takes, then what they think of each `run=`."""
    known = {"folder": "../shared/media/digits", "seed": "0", "clips": "240", "duration_s": "0.64"}
    runs = [word.removeprefix("run=") for word in words if word.startswith("run=")]
    for word in words:
        key, _, value = word.partition("=")
        if key not in (*known, "run"):
            raise UserError(f"{word}: no such word; there are run, {', '.join(known)}")
        known |= {key: value} if key != "run" else {}
    judges = Judges.train(known["folder"], seed=int(known["seed"]))
    takes = read_takes(known["folder"], HELDOUT_TAKES)
    raw = [take.waveform for take in takes]
    kinds = (
        ("real", raw),
        ("through the codec", through_codec(raw)),
        ("loud, through the codec", through_codec([waveform * gain_to_peak(waveform, 0.7) for waveform in raw])),
    )
    for name, waveforms in kinds:
        digit, speaker = judges.score(waveforms, takes)
        print(f"{name:25}  digit {digit:.3f}  speaker {speaker:.3f}  ({len(takes)} takes)", flush=True)
    rng = np.random.default_rng(int(known["seed"]))
    names, count = judges.speakers, int(known["clips"])
    wanted = [(number % 10, names[number // 10 % len(names)]) for number in range(count)]
    voices = {name: [take for take in takes if take.speaker == name] for name in names}
    references = [voices[name][rng.integers(len(voices[name]))] for _, name in wanted]
    asked = [replace(voice, digit=digit) for (digit, _), voice in zip(wanted, references, strict=True)]
    for run in runs:
        waveforms = speak(run, references, [digit for digit, _ in wanted], duration_s=float(known["duration_s"]))
        digit, speaker = judges.score(waveforms, asked)
        print(f"{run:25}  digit {digit:.3f}  speaker {speaker:.3f}  ({len(asked)} clips)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
