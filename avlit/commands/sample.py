"""`just sample`: clips from a trained run, written as MP4 with the sound that drove them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from avlit.commands.request import REQUEST_KEYS, is_content, is_request_key, request_from_words
from avlit.config import Config, ConfigError, from_yaml
from avlit.inherit import resolve_weights
from avlit.runs import Run, find_run
from avlit.settings import leaves, nearest, read_words

RUN_KEYS = ("run", "runs_dir", "out", "seed", "sample.steps", "sample.guidance", "sample.scheduler")
PLACE_KEYS = (
    "model.weights", "codecs.video_weights", "codecs.audio_weights", "codecs.text_weights", "train.accelerator",
    "train.threads",
)  # fmt: skip
"""Where weights lie on this machine, and what computes."""
HELDOUT_KEYS = ("sample.count", "data.root", "data.cache_dir", "data.subsets", "data.num_clips")
SIZE_KEYS = ("data.num_frames", "data.height", "data.width")


def main(words: Sequence[str]) -> int:
    """`run=RUN` (`last`, an id, a folder) and what to make.

    One clip: `prompt=…`, `prompt.SECONDS=…`, `speech=FILE`, `speech_second=FILE`, `effects=FILE`, `music=FILE`,
    `image.FRAME=FILE`, `duration_s=…`, `seed=…`, `out=FILE.mp4`. None of these: the first held-out clips of the run's
    data (`sample.count`) with their own prompts and tracks, into `out=FOLDER`.
    """
    given = read_words(words)
    if "run" not in given:
        raise ConfigError("run=… is missing: run=last, the id of a run, or its folder")
    run = find_run(Path(given.get("runs_dir", "runs")), given["run"])
    if any(is_content(key) for key in given):
        return sample_clip(run, given)
    return sample_heldout(run, given)


def sample_clip(run: Run, words: Mapping[str, str]) -> int:
    """One clip for one request."""
    config = read_config(run, words, allowed=(*RUN_KEYS, *PLACE_KEYS, *SIZE_KEYS, *REQUEST_KEYS), what="one clip")
    request_words = {key: value for key, value in words.items() if is_request_key(key)}
    request = request_from_words(request_words, seed=config.seed)
    out = Path(words["out"]) if "out" in words else None
    if out is not None and out.suffix != ".mp4":
        raise ConfigError(f"out={out}: one clip is written to a file, for example out={out.name or 'clip'}.mp4")
    checkpoint = resolve_weights(run.path, runs_dir=Path(config.runs_dir))
    if out is None:
        digest = hashlib.sha256(repr(sorted(request_words.items())).encode()).hexdigest()[:6]
        out = run.samples_dir / f"step-{checkpoint.step:08d}-seed-{request.seed}-{digest}.mp4"
    if out.exists():
        raise ConfigError(f"out={out}: is there already; give another out=, or remove it")

    from tqdm import tqdm

    from avlit.commands.generation import Generator, clip_timing, has_second_speaker
    from avlit.commands.plan import plan_clip

    # before the weights are read, so that a mistake is answered at once
    plan = plan_clip(request, timing=clip_timing(config), has_second=has_second_speaker(config))
    generator = Generator.of_checkpoint(config, checkpoint)
    for note in (*plan.notes, *generator.text_notes(request)):
        print(note)
    with tqdm(total=generator.num_steps(plan), desc="sampling", unit="step") as bar:

        def on_step() -> None:
            bar.update()

        generator.write(plan, out, on_step=on_step)
    print(out)
    return 0


def sample_heldout(run: Run, words: Mapping[str, str]) -> int:
    """The first held-out clips of the run's data, with their prompts and tracks."""
    config = read_config(run, words, allowed=(*RUN_KEYS, *PLACE_KEYS, *HELDOUT_KEYS), what="held-out clips")
    if config.sample.count < 1:
        raise ConfigError(f"sample.count={config.sample.count}: nothing to sample; give 1 or more")
    checkpoint = resolve_weights(run.path, runs_dir=Path(config.runs_dir))
    out = words.get("out")
    folder = Path(out) if out else run.samples_dir / f"step-{checkpoint.step:08d}-seed-{config.seed}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out={folder}: is not an empty folder; give another out= or another seed=")

    from avlit.commands.assembly import build_datamodule, build_encoders, shard_roots
    from avlit.commands.clips import write_clips
    from avlit.commands.generation import load_trained

    roots = shard_roots(config)
    encoders = build_encoders(config)
    module = load_trained(config, checkpoint)
    clips = build_datamodule(config, roots, encoders).heldout_samples(config.sample.count)
    paths = write_clips(module, clips, codec=encoders.video, settings=config.sample, seed=config.seed, folder=folder)
    for path in paths:
        print(path)
    return 0


def read_config(run: Run, words: Mapping[str, str], *, allowed: Sequence[str], what: str) -> Config:
    """The run's config with those of the words over it that are config keys.

    allowed: the words that have an effect on `what` is made; ConfigError for any other, with the nearest of them.
    """
    text, source = run.config_path.read_text(encoding="utf-8"), str(run.config_path)
    known = leaves(type(from_yaml(text, source=source)))
    for key, value in words.items():
        if key in allowed or (is_content(key) and any(is_content(other) for other in allowed)):
            continue
        if key.startswith("data.subsets.") and "data.subsets" in allowed:
            continue
        if key in known or is_request_key(key):
            raise ConfigError(f"{key}={value}: has no effect on {what}; leave it out")
        near = nearest(key, allowed)
        raise ConfigError(f"{key}={value}: no such word{f'; did you mean {near}?' if near else ''}")
    own = [f"{key}={value}" for key, value in words.items() if key in known or key.startswith("data.subsets.")]
    return from_yaml(text, words=own, source=source)
