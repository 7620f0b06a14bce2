"""`just sample`: clips from a trained run, written as MP4 with their sound, or as WAV of sound alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from avlit.commands.request import REQUEST_KEYS, is_content, is_request_key, request_from_words
from avlit.config import Config, ConfigError, from_yaml
from avlit.runs import Run, find_run
from avlit.settings import leaves, nearest, read_words

if TYPE_CHECKING:  # a wrong word must not wait for torch
    from avlit.checkpoints import Checkpoint
    from avlit.commands.abilities import Abilities

RUN_KEYS = ("run", "runs_dir", "out", "seed", "sample.steps")
PLACE_KEYS = (
    "model.weights", "codecs.video_weights", "codecs.audio_weights", "codecs.tracks_weights", "codecs.text_weights",
    "train.accelerator", "train.threads",
)  # fmt: skip
"""Where weights lie on this machine, and what computes."""
HELDOUT_KEYS = ("sample.count", "data.root", "data.cache_dir", "data.subsets", "data.num_clips")
CLIP_KEYS = (*RUN_KEYS, *PLACE_KEYS, *REQUEST_KEYS)


def main(words: Sequence[str]) -> int:
    """`run=RUN` (`last`, an id, a folder) and what to make.

    One clip: `prompt=…`, `prompt.SECONDS=…`, `speech=FILE`, `speech_second=FILE`, `effects=FILE`, `music=FILE`,
    `reference=FILE`, `video=FILE`, `image.FRAME=FILE`, `reference_image=FILE`, `depth=FILE` or `pose=FILE` as far as
    the run's recipe takes them; `duration_s=…`, `seed=…`, `out=FILE.mp4`, or FILE.wav for sound alone. One of them in
    several versions: `vary=music music=a.wav,b.wav`, into `out=FOLDER`. Many clips: `jobs=FILE.jsonl out=FOLDER`. None
    of these: the first held-out clips of the run's data (`sample.count`) with their own conditions, into `out=FOLDER`.
    """
    given = read_words(words)
    if "run" not in given:
        raise ConfigError("run=… is missing: run=last, the id of a run, or its folder")
    run = find_run(Path(given.get("runs_dir", "runs")), given["run"])
    if "jobs" in given:
        return sample_jobs(run, given)
    if "vary" in given:
        return sample_variants(run, given)
    if any(is_content(key) for key in given):
        return sample_clip(run, given)
    return sample_heldout(run, given)


def sample_clip(run: Run, words: Mapping[str, str]) -> int:
    """One clip for one request."""
    config = read_config(run, words, allowed=CLIP_KEYS, what="one clip")
    request_words = {key: value for key, value in words.items() if is_request_key(key)}
    request = request_from_words(request_words, seed=config.seed)
    abilities = read_abilities(config)
    out = Path(words["out"]) if "out" in words else None
    if out is not None and out.suffix != abilities.suffix:
        stem = out.stem if out.suffix in (".mp4", ".wav") else out.name or "clip"
        one = "one clip" if abilities.makes_video else "a clip of sound alone"
        raise ConfigError(f"out={out}: {one} is written to a file, for example out={stem}{abilities.suffix}")
    checkpoint = newest_checkpoint(run, config)
    out = out or default_out(run, checkpoint, request_words, seed=request.seed, suffix=abilities.suffix)
    if out.exists():
        raise ConfigError(f"out={out}: is there already; give another out=, or remove it")

    from avlit.commands.generation import Generator
    from avlit.commands.plan import plan_clip

    plan = plan_clip(request, abilities)
    make_folder(out.parent)
    generator = Generator.of_checkpoint(config, checkpoint)
    for note in (*plan.notes, *generator.text_notes(request)):
        print(note)
    with progress(generator.num_steps(plan)) as on_step:
        generator.write(plan, out, on_step=on_step)
    print(out)
    return 0


def sample_variants(run: Run, words: Mapping[str, str]) -> int:
    """One request with one thing exchanged, as a grid."""
    config = read_config(run, words, allowed=(*CLIP_KEYS, "vary"), what="a grid")
    key = words["vary"]
    request_words = {word: value for word, value in words.items() if is_request_key(word)}
    values = request_words.pop(key, "")
    request = request_from_words(request_words, seed=config.seed)

    from avlit.commands.variations import refuse_unlike, variants, write_grid

    wanted = variants(request, key, values)
    checkpoint = newest_checkpoint(run, config)
    described = {**request_words, key: values, "vary": key}
    folder = Path(words["out"]) if "out" in words else default_out(run, checkpoint, described, seed=request.seed)
    refuse_occupied(folder)

    from avlit.commands.generation import Generator
    from avlit.commands.plan import plan_clip

    abilities = read_abilities(config)
    made = [(variant, plan_clip(variant.request, abilities)) for variant in wanted]
    refuse_unlike(made, key=key)
    make_folder(folder)
    generator = Generator.of_checkpoint(config, checkpoint)
    for variant, each in made:
        for note in (*each.notes, *generator.text_notes(variant.request)):
            print(f"{variant.name}: {note}")
    with progress(sum(generator.num_steps(each) for _, each in made)) as on_step:
        paths = write_grid(generator, made, folder, key=key, on_step=on_step)
    print(*paths, sep="\n")
    return 0


def sample_jobs(run: Run, words: Mapping[str, str]) -> int:
    """Many requests from a file; those whose results are in the folder already are left out."""
    if near := [key for key in words if is_content(key) or key in ("duration_s", "free_prompts")]:
        raise ConfigError(f"{near[0]}={words[near[0]]}: belongs into the lines of jobs={words['jobs']}")
    config = read_config(run, words, allowed=(*RUN_KEYS, *PLACE_KEYS, "jobs"), what="jobs")
    if "out" not in words:
        raise ConfigError("out=… is missing: jobs=FILE.jsonl needs out=FOLDER for its clips")
    folder = Path(words["out"])
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder}: is a file; jobs= writes to a folder")

    from avlit.commands.generation import Generator
    from avlit.commands.jobs import origin_of, plan_jobs, read_jobs, run_jobs

    jobs = read_jobs(Path(words["jobs"]), seed=config.seed)
    checkpoint = newest_checkpoint(run, config)
    origin = origin_of(config.sample, run=run.id, step=checkpoint.step)
    waiting, num_done = plan_jobs(jobs, folder, abilities=read_abilities(config), origin=origin)
    make_folder(folder)
    if waiting:
        run_jobs(Generator.of_checkpoint(config, checkpoint), waiting, folder, origin=origin)
    print(f"{folder}: {len(waiting)} clips made, {num_done} were there already")
    return 0


def newest_checkpoint(run: Run, config: Config) -> Checkpoint:
    """The run's newest checkpoint that verifies."""
    from avlit.inherit import resolve_weights

    return resolve_weights(run.path, runs_dir=Path(config.runs_dir))


def read_abilities(config: Config) -> Abilities:
    """What requests are checked against before the weights are read, so that a mistake is answered at once."""
    from avlit.commands.abilities import Abilities

    return Abilities.of(config)


@contextmanager
def progress(num_steps: int) -> Iterator[Callable[[], None]]:
    """A bar over the sampler's steps; gives what is to be called after each."""
    from tqdm import tqdm

    with tqdm(total=num_steps, desc="sampling", unit="step") as bar:

        def on_step() -> None:
            bar.update()

        yield on_step


def default_out(run: Run, checkpoint: Checkpoint, words: Mapping[str, str], *, seed: int, suffix: str = "") -> Path:
    """A place in the run's samples that the same words find again and others do not."""
    digest = hashlib.sha256(repr(sorted(words.items())).encode()).hexdigest()[:6]
    return run.samples_dir / f"step-{checkpoint.step:08d}-seed-{seed}-{digest}{suffix}"


def make_folder(folder: Path) -> None:
    """Make `folder` now, so that one that cannot be written is known before the weights are read."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={folder}: cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"out={folder}: cannot be written to; give another out=")


def refuse_occupied(folder: Path) -> None:
    """Raise ConfigError unless `folder` is free for new files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out={folder}: is not an empty folder; give another out=, or another seed=")


def sample_heldout(run: Run, words: Mapping[str, str]) -> int:
    """The first held-out clips of the run's data, with their prompts, tracks and controls.

    Controls and voices are written beside them, into `controls/`, as files that a request can give.
    """
    config = read_config(run, words, allowed=(*RUN_KEYS, *PLACE_KEYS, *HELDOUT_KEYS), what="held-out clips")
    if read_abilities(config).draft is not None:
        raise ConfigError(
            f"sample.stages={getattr(config.sample, 'stages', '')}: held-out clips have their controls at one size; "
            "leave it out, or ask for a clip with prompt=…"
        )
    if config.sample.count < 1:
        raise ConfigError(f"sample.count={config.sample.count}: nothing to sample; give 1 or more")
    checkpoint = newest_checkpoint(run, config)
    out = words.get("out")
    folder = Path(out) if out else run.samples_dir / f"step-{checkpoint.step:08d}-seed-{config.seed}"
    refuse_occupied(folder)

    from avlit.commands.assembly import build_datamodule, build_encoders, shard_roots
    from avlit.commands.clips import write_clips
    from avlit.commands.control_files import write_controls
    from avlit.commands.generation import load_trained

    roots = shard_roots(config)
    encoders = build_encoders(config)
    module = load_trained(config, checkpoint)
    clips = build_datamodule(config, roots, encoders).heldout_samples(config.sample.count)
    paths = write_clips(module, clips, encoders=encoders, settings=config.sample, seed=config.seed, folder=folder)
    for path in (*paths, *write_controls(clips, encoders, folder / "controls")):
        print(path)
    return 0


def read_config(run: Run, words: Mapping[str, str], *, allowed: Sequence[str], what: str) -> Config:
    """The run's config with those of the words over it that are config keys.

    allowed: the words that have an effect on `what` is made; ConfigError for any other, with the nearest of them.
    """
    text, source = run.read_config(), str(run.config_path)
    trained = from_yaml(text, source=source)
    known = leaves(type(trained))
    if "sample.steps" in allowed:  # a recipe's sampler has keys of its own
        allowed = (*allowed, *(f"sample.{name}" for name in trained.sample.of_one_clip))
    if trained.codecs.video == "none" and trained.data.root is not None:
        allowed = (*allowed, "data.root")  # the shards say how long its clips are
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
