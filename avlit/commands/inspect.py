"""`just inspect`: what a trained model does inside, and what its data is, as numbers and as a picture.

`attention`: where the joint attention of video and sound goes in one held-out clip (UniTalking, Fig. 5). `mouth`: the
mouth boxes of clips and the latent cells under them (JoVA, Appendix A).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avlit.commands.sample import PLACE_KEYS, default_out, make_folder, newest_checkpoint, read_config
from avlit.config import Config, ConfigError
from avlit.runs import Run, find_run
from avlit.settings import nearest, read_words

if TYPE_CHECKING:  # a wrong word must not wait for torch
    from avlit.metrics.attention import AttentionShares, Share
    from avlit.models.attention_maps import AttentionMaps
    from avlit.module import AVModule
    from data.datamodule import HeldoutClip

SUBJECTS = {
    "attention": "where video and sound look: run=last|ID|FOLDER [clip=0] [noise=0.5] [layers=0,3] [out=FILE.png]",
    "mouth": "boxes of mouths, and their latent cells: recipe=… out=FILE.png [data.root=FOLDER] [clip=KEY,KEY]",
}
ATTENTION_KEYS = (
    "run", "runs_dir", "out", "seed", "clip", "noise", "layers", *PLACE_KEYS,
    "data.root", "data.cache_dir", "data.subsets", "data.num_clips",
)  # fmt: skip


def main(words: Sequence[str]) -> int:
    """What to look at, then further words.

    attention: `run=RUN` (`last`, an id, a folder); `clip=…`, the number of a held-out clip of the run's data;
    `noise=…`, the level that both streams are noised to; `layers=…`, all without it; `seed=…` of the noise;
    `out=FILE.png`.
    mouth: see `inspect_mouth`.
    """
    subject = words[0] if words and "=" not in words[0] else ""
    if subject not in SUBJECTS:
        near = nearest(subject, list(SUBJECTS))
        mistake = f"{subject}: cannot be inspected" if subject else "what to inspect is missing before the other words"
        known = "; ".join(f"just inspect {name}: {about}" for name, about in SUBJECTS.items())
        raise ConfigError(f"{mistake}; did you mean {near}?" if near else f"{mistake}. {known}")
    given = read_words(words[1:])
    if subject == "mouth":
        from avlit.commands.inspect_mouth import inspect_mouth

        return inspect_mouth(given)
    if "run" not in given:
        raise ConfigError("run=… is missing: run=last, the id of a run, or its folder")
    return inspect_attention(find_run(Path(given.get("runs_dir", "runs")), given["run"]), given)


def inspect_attention(run: Run, words: Mapping[str, str]) -> int:
    """The attention of the run's averaged weights in one held-out clip: numbers for each layer, and a picture."""
    config = read_config(run, words, allowed=ATTENTION_KEYS, what="attention")
    number, noise = read_number(words.get("clip", "0")), read_noise(words.get("noise", "0.5"))
    layers = read_layers(words["layers"]) if "layers" in words else None
    if config.codecs.video == "none":
        raise ConfigError(f"run={run.id}: {config.recipe} sees no video (codecs.video=none), so sound looks at none")
    checkpoint = newest_checkpoint(run, config)
    described = {name: value for name, value in words.items() if name not in ("run", "runs_dir", "out", *PLACE_KEYS)}
    out = Path(words["out"]) if "out" in words else None
    if out is not None and out.suffix != ".png":
        raise ConfigError(f"out={out}: the picture is written to a file, for example out={out.stem or 'attention'}.png")
    out = out or default_out(run, checkpoint, {"inspect": "attention", **described}, seed=config.seed, suffix=".png")
    if out.exists():
        raise ConfigError(f"out={out}: is there already; give another out=, or remove it")
    make_folder(out.parent)

    import torch

    from avlit.commands.assembly import build_datamodule, build_encoders, shard_roots
    from avlit.commands.clips import to_frames
    from avlit.commands.generation import load_trained
    from avlit.models.attention_maps import draw_attention

    roots = shard_roots(config)
    encoders = build_encoders(config)
    module = load_trained(config, checkpoint)
    clips = build_datamodule(config, roots, encoders).heldout_samples(number + 1)
    if number >= len(clips):
        raise ConfigError(f"clip={number}: the data has {len(clips)} held-out clips, from 0 to {len(clips) - 1}")
    clip = clips[number]
    if module.joint_conditions(clip.batch) is None:
        raise ConfigError(
            f"run={run.id}: the model of {config.recipe} has no joint attention of video and sound to show; give a run "
            "of a recipe that has, such as unitalking_stage2, or jova_stage2 with model.fusion=joint"
        )
    model: Any = module.model
    if unknown := [layer for layer in layers or () if layer >= model.num_joint_layers]:
        last = model.num_joint_layers - 1
        raise ConfigError(f"layers={words['layers']}: there is no layer {unknown[0]}, only 0 to {last}")
    maps = clip_attention(module, clip, noise=noise, seed=config.seed, layers=layers)
    assert clip.batch.video_latents is not None and encoders.video is not None
    with torch.no_grad():
        frames = encoders.video.decode(clip.batch.video_latents.to(module.device).float()).clamp(-1, 1).cpu()[0]
    print(f"Clip {clip.batch.keys[0]}: {clip.batch.captions[0]}")
    print(*table(maps, clip, config), sep="\n")
    draw_attention(maps, to_frames(frames), out, duration_s=clip.batch.duration_s)
    print(out)
    return 0


def clip_attention(
    module: AVModule, clip: HeldoutClip, *, noise: float, seed: int, layers: Sequence[int] | None
) -> AttentionMaps:
    """The maps of a clip, both streams noised to level `noise` of the flow, with its own conditions."""
    import torch

    from avlit.models.attention_maps import attention_maps
    from avlit.objectives import flow_diffuse
    from avlit.randomness import Draws

    batch = clip.batch.to(module.device)
    video, audio, conditions = batch.video_latents, batch.audio_latents, module.joint_conditions(batch)
    assert video is not None and audio is not None and conditions is not None
    draws = Draws(seed, batch.step, batch.slots, is_training=False)
    level = torch.full((len(batch),), noise, device=module.device)
    model: Any = module.model
    return attention_maps(
        model,
        flow_diffuse(video, draws.normal("video noise", video), level),
        flow_diffuse(audio, draws.normal("audio noise", audio), level),
        video_timestep=1000 * level,
        audio_timestep=1000 * level,
        layers=layers,
        **conditions,
    )


def table(maps: AttentionMaps, clip: HeldoutClip, config: Config) -> list[str]:
    """A line for each layer, and one of what attention spread evenly would give, in per cent."""
    from avlit.metrics.attention import attention_shares, mouth_cover

    about = clip.annotation
    latent_frames = [config.timing.latent_frame_of(frame) for frame in range(about.num_frames)]
    try:
        mouths = mouth_cover(
            about.mouth_boxes, grid=maps.grid, size=(about.height, about.width), latent_frames=latent_frames
        )
    except ValueError as error:
        raise ConfigError(
            f"clip={clip.batch.keys[0]}: has mouth boxes of {len(about.mouth_boxes)} frames, but {about.num_frames} "
            "frames; mend its shard, or give another clip="
        ) from error
    shares = {
        f"layer {layer}": attention_shares(
            to_video[0], to_audio[0], grid=maps.grid, num_keys=maps.num_keys[0], mouths=mouths
        )
        for layer, to_video, to_audio in zip(maps.layers, maps.audio_to_video, maps.video_to_audio, strict=True)
    }
    rows = [(name, [_percent(share) for share in parts(each)]) for name, each in shares.items()]
    even = parts(next(iter(shares.values())))
    rows.append(("spread evenly", [_percent(share, is_chance=True) for share in even]))
    heads = ("sound to video", "in mouth boxes", "video to sound", "within a latent frame")
    lines = [" " * 13 + "".join(f"  {head}" for head in heads)]
    return lines + [
        f"{name:<13}" + "".join(f"  {value:>{len(head)}}" for value, head in zip(values, heads, strict=True))
        for name, values in rows
    ]


def parts(shares: AttentionShares) -> tuple[Share | None, ...]:
    """The shares in the order of the table's columns."""
    return shares.sound_to_video, shares.in_mouths, shares.video_to_sound, shares.in_time


def _percent(share: Share | None, *, is_chance: bool = False) -> str:
    return "no boxes" if share is None else f"{share.chance if is_chance else share.found:.1%}"


def read_number(text: str) -> int:
    """The value of clip=."""
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"clip={text}: must be the number of a held-out clip, from 0")
    return int(text)


def read_noise(text: str) -> float:
    """The value of noise=."""
    try:
        level = float(text)
    except ValueError:
        level = -1.0
    if not 0 <= level <= 1:
        raise ConfigError(f"noise={text}: must be a number from 0 (clean) to 1 (noise alone)")
    return level


def read_layers(text: str) -> tuple[int, ...]:
    """The value of layers=."""
    numbers = text.split(",")
    if not all(number.isascii() and number.isdigit() for number in numbers) or len(set(numbers)) < len(numbers):
        raise ConfigError(f"layers={text}: must be different numbers of layers, from 0, for example layers=0,3")
    return tuple(map(int, numbers))
