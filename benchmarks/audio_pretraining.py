"""Is generated speech better where the audio branch learnt to speak first? UniTalking's claim, on the embedded corpus.

`python -m benchmarks.audio_pretraining [seeds=0,1,2] [stage1_steps=N] [stage2_steps=N] [clips=64] [KEY=VALUE …]`: a
seed trains stage 1, stage 2 from it and stage 2 from scratch, with equal steps and the same further words; then a
judge writes down what held-out clips say. `run=RUN …` judges runs that are there instead of training any.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from avlit.commands.assembly import build_datamodule, build_encoders, shard_roots
from avlit.commands.clips import sample_clips
from avlit.commands.corpus_judge import FIRST, NUM_CLIPS, corpus_judge, corpus_speech
from avlit.commands.generation import load_trained, run_config
from avlit.commands.sample import newest_checkpoint
from avlit.commands.train import train
from avlit.config import Config, load_config
from avlit.errors import UserError
from avlit.metrics.word_judge import RATE_HZ, WordJudge
from avlit.runs import Run, find_run
from avlit.sound import resample
from benchmarks.digits import through_codec
from data.corpus import CorpusSettings

MEASURED = ("words", "words_shuffled", "val/loss/audio", "val/loss/video", "val/lip_sync", "val/lip_sync_shuffled")


def judge_run(judge: WordJudge, run: Run, *, num_clips: int) -> dict[str, float]:
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


def check_judge(judge: WordJudge, *, num_frames: int, fps: float) -> None:
    """Print the judge's word accuracy on clips of this length that it never heard: what bounds the models' own."""
    first = FIRST + NUM_CLIPS
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
    judge = corpus_judge()
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
