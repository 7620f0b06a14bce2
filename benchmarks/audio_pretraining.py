"""Is generated speech better where the audio branch learnt to speak first? UniTalking's claim, on the embedded corpus.

`python -m benchmarks.audio_pretraining [seeds=0,1,2] [stage1_steps=N] [stage2_steps=N] [clips=64] [KEY=VALUE …]`: a
seed trains stage 1, stage 2 from it and stage 2 from scratch, with equal steps and the same further words; then a
judge writes down what held-out clips say. `run=RUN …` judges runs that are there instead of training any.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.text import word_error_rate

from avlit.codecs.embedded_audio import EmbeddedAudioCodec, mel_filters, power_spectrum
from avlit.commands.assembly import build_datamodule, build_encoders, shard_roots
from avlit.commands.clips import sample_clips
from avlit.commands.generation import load_trained, run_config
from avlit.commands.sample import newest_checkpoint
from avlit.commands.train import train
from avlit.config import Config, load_config
from avlit.errors import UserError
from avlit.runs import Run, find_run
from avlit.sound import resample
from benchmarks.digits import through_codec
from data.clip import RawClip
from data.corpus import CorpusSettings, make_clip
from data.corpus.voice import VOCABULARY

WORDS = tuple(VOCABULARY)
"""What is spoken; class 0 of the judge is everything else."""

JUDGED_START, NUM_JUDGED = 500_000, 320
"""Clips that train the judge: no model trains on them, nor is any sampled for them."""

RATE_HZ, FFT_SIZE, HOP, NUM_MELS = EmbeddedAudioCodec.rate_hz, 512, 160, 40
"""What the judge hears: 40 log-mel bands up to 8 kHz, 100 a second."""

FLOOR = 1e-5
"""Power below a clip's loudest band that counts as silence (50 dB), so that the judge does not know a clip's level."""

SHORTEST_RUN = 8
"""Frames of 10 ms that a word lasts at least; the shortest of the corpus lasts 270 ms."""

MEASURED = ("words", "words_shuffled", "val/loss/audio", "val/loss/video", "val/lip_sync", "val/lip_sync_shuffled")


def hear(waveforms: Tensor) -> Tensor:
    """[B, N] at 16 kHz -> log-mel [B, 40, M], M = N // 160 + 1: 0 at a clip's loudest band, -1 in its silence."""
    filters = mel_filters(num_mels=NUM_MELS, fft_size=FFT_SIZE, rate_hz=RATE_HZ)
    power = power_spectrum(waveforms, fft_size=FFT_SIZE, hop=HOP) @ filters  # [B, M, 40]
    power = power / power.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return -(power + FLOOR).log10().transpose(1, 2) / math.log10(FLOOR)


class Listener(nn.Sequential):
    """Log-mel [B, 40, M] -> logits [B, 17, M]: dilated convolutions that overlook 1.3 seconds, longer than any word."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        channels = NUM_MELS
        for dilation in (1, 2, 4, 8, 16):
            conv = nn.Conv1d(channels, 96, 5, padding=2 * dilation, dilation=dilation)
            layers += [conv, nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.1)]
            channels = 96
        super().__init__(*layers, nn.Conv1d(channels, 1 + len(WORDS), 1))


def vary(heard: Tensor, generator: torch.Generator) -> Tensor:
    """Log-mel [B, 40, M] as imperfect speech might have it: tilted, noisy, with a band missing."""
    slope = torch.linspace(-1, 1, NUM_MELS)[None, :, None]
    tilt = 0.05 * torch.randn(len(heard), 1, 1, generator=generator) * slope
    heard = (heard + tilt + 0.05 * torch.randn(heard.shape, generator=generator)).clamp_min(-1.0)
    first = torch.randint(0, NUM_MELS, (len(heard), 1), generator=generator)
    width = torch.randint(0, 6, (len(heard), 1), generator=generator)
    band = torch.arange(NUM_MELS)[None]
    return heard.masked_fill(((band >= first) & (band < first + width))[..., None], -1.0)


def frame_labels(clip: RawClip, num_frames: int) -> Tensor:
    """The class of each 10 ms of a clip [M], int64: 1 + the word's place in `WORDS`, or 0 between words."""
    labels = torch.zeros(num_frames, dtype=torch.int64)
    times = torch.arange(num_frames) * HOP / RATE_HZ
    spoken = clip.truth["words"]
    assert isinstance(spoken, list)
    for word in spoken:
        labels[(times >= word["start_s"]) & (times < word["end_s"])] = 1 + WORDS.index(word["word"])
    return labels


@dataclass(frozen=True)
class Judge:
    """Writes down the words of a sound, by a network that was trained on the corpus's own speech."""

    listener: Listener

    @classmethod
    def train(cls, *, seed: int = 0, epochs: int = 6) -> "Judge":
        """A judge of clips with one speaker, as they are and as the embedded codec gives them back."""
        clips = corpus_speech(range(JUDGED_START, JUDGED_START + NUM_JUDGED), CorpusSettings())
        raw = [clip.speech for clip in clips]
        heard = hear(torch.from_numpy(np.stack([*raw, *through_codec(raw)])))  # [2 B, 40, M]
        labels = torch.stack([frame_labels(clip, heard.shape[2]) for clip in clips]).repeat(2, 1)  # [2 B, M]
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            listener = Listener()
            optimizer = torch.optim.AdamW(listener.parameters(), 2e-3, weight_decay=0.05)
            steps = epochs * -(-len(labels) // 32)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
            for _ in range(epochs):
                for rows in torch.randperm(len(labels), generator=generator).split(32):
                    logits = listener(vary(heard[rows], generator))
                    loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        return cls(listener.eval())

    @torch.no_grad()
    def __call__(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        """Sounds float32 [N] in [-1, 1] at 16 kHz -> the words of each, in order."""
        counts = [len(waveform) // HOP + 1 for waveform in waveforms]
        padded = pad_sequence([torch.from_numpy(waveform) for waveform in waveforms], batch_first=True)
        found = self.listener(hear(padded)).argmax(1).tolist()  # [B, M]
        return [transcribe(classes[:count]) for classes, count in zip(found, counts, strict=True)]

    def score(self, waveforms: Sequence[np.ndarray], transcripts: Sequence[str]) -> tuple[float, float]:
        """Word accuracy of sounds against their own transcripts, and against those of all other sounds."""
        said, count = self(waveforms), len(transcripts)
        others = [word_accuracy(said, [*transcripts[k:], *transcripts[:k]]) for k in range(1, count)]
        return word_accuracy(said, transcripts), mean(others)


def transcribe(classes: Sequence[int]) -> str:
    """Classes of frames -> words: runs of a word that last long enough, each once (the corpus repeats none at once)."""
    runs = [(label, len(list(frames))) for label, frames in groupby(classes)]
    kept = [label for label, length in runs if label and length >= SHORTEST_RUN]
    return " ".join(WORDS[label - 1] for label, _ in groupby(kept))


def word_accuracy(said: Sequence[str], transcripts: Sequence[str]) -> float:
    """1 - edit distance / number of words, over all clips together, at least 0."""
    return max(0.0, 1 - float(word_error_rate(list(said), list(transcripts))))


def corpus_speech(numbers: Sequence[int], settings: CorpusSettings) -> list[RawClip]:
    """Clips of the corpus with one speaker, without picture."""
    return [make_clip("basic_face", n, settings, has_frames=False, has_references=False) for n in numbers]


def judge_run(judge: Judge, run: Run, *, num_clips: int) -> dict[str, float]:
    """What a run measured at its end, and the word accuracy of the sound that it generates for held-out clips."""
    config = run_config(run, [])
    module, encoders = load_trained(config, newest_checkpoint(run, config)), build_encoders(config)
    clips = build_datamodule(config, shard_roots(config), encoders).heldout_samples(num_clips)
    made = sample_clips(module, clips, encoders=encoders, settings=config.sample, seed=config.seed)
    transcripts = [clip.annotation.transcript for clip in clips]
    words, shuffled = judge.score([resample(each.waveform, each.rate_hz, RATE_HZ) for each in made], transcripts)
    metrics = json.loads(run.metrics_path.read_text()) if run.metrics_path.exists() else {}
    measured = {"words": words, "words_shuffled": shuffled} | metrics
    return {name: measured[name] for name in MEASURED if name in measured}


def check_judge(judge: Judge, *, num_frames: int, fps: float) -> None:
    """Print the judge's word accuracy on clips of this length that it never heard: what bounds the models' own."""
    first = JUDGED_START + NUM_JUDGED
    clips = corpus_speech(range(first, first + 128), CorpusSettings(num_frames=num_frames, fps=fps))
    raw, transcripts = [clip.speech for clip in clips], [clip.transcript for clip in clips]
    for name, waveforms in (("real", raw), ("real, through the codec", through_codec(raw))):
        own, shuffled = judge.score(waveforms, transcripts)
        print(f"{name:28}  words {own:.3f}  shuffled {shuffled:.3f}  ({len(clips)} clips)", flush=True)


def train_seed(seed: int, *, stage1_steps: int, stage2_steps: int, words: Sequence[str]) -> dict[str, Run]:
    """The runs of one seed by what they are called in the table."""
    runs = {"stage 1": _trained("unitalking_stage1", stage1_steps, seed, words)}
    runs["from stage 1"] = _trained("unitalking_stage2", stage2_steps, seed, [*words, f"init={runs['stage 1'].path}"])
    runs["from scratch"] = _trained("unitalking_stage2", stage2_steps, seed, words)
    return runs


def _trained(recipe: str, steps: int, seed: int, words: Sequence[str]) -> Run:
    outcome = train(load_config([f"recipe={recipe}", *words, f"train.steps={steps}", f"seed={seed}"]))
    if outcome.exit_status:
        raise KeyboardInterrupt
    return outcome.run


def line(name: str, measured: dict[str, float]) -> str:
    """One row of the table."""
    return f"{name:28}  " + "  ".join(f"{key.removeprefix('val/')} {value:.3f}" for key, value in measured.items())


def main(words: Sequence[str]) -> None:
    """Train and judge every seed, or judge every `run=`; then mean and spread over the seeds."""
    known = {"seeds": "0,1,2", "stage1_steps": "", "stage2_steps": "", "clips": "64"}
    named, further = [], []
    for word in words:
        key, _, value = word.partition("=")
        if key == "run":
            named.append(find_run(Path("runs"), value))
        elif key in known:
            known[key] = value
        else:
            further.append(word)
    if named and further:
        raise UserError(f"{further[0]}: has no effect on runs that are there; give either run=… or words to train with")
    stages: list[Config] = [load_config([f"recipe=unitalking_{stage}", *further]) for stage in ("stage1", "stage2")]
    clip, num_clips = (run_config(named[0], []) if named else stages[1]).data, int(known["clips"])
    judge = Judge.train()
    check_judge(judge, num_frames=clip.num_frames, fps=clip.fps)
    for run in named:
        print(line(run.id, judge_run(judge, run, num_clips=num_clips)), flush=True)
    if named:
        return
    steps = [int(known[f"stage{number}_steps"] or stage.train.steps) for number, stage in enumerate(stages, 1)]
    table: dict[str, list[dict[str, float]]] = defaultdict(list)
    for seed in map(int, known["seeds"].split(",")):
        runs = train_seed(seed, stage1_steps=steps[0], stage2_steps=steps[1], words=further)
        for name, run in runs.items():
            table[name].append(judge_run(judge, run, num_clips=num_clips))
            print(line(f"seed {seed}, {name}", table[name][-1]), flush=True)
    for name, rows in table.items():
        for key in rows[0]:
            values = [row[key] for row in rows]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            print(f"{name:14}  {key.removeprefix('val/'):18}  {mean(values):.3f}{spread}  ({len(values)} seeds)")


if __name__ == "__main__":
    main(sys.argv[1:])
