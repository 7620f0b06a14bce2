"""Generator: a trained run, loaded once, that makes any number of clips from requests; what `just sample` calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.checkpoints import Checkpoint
from avlit.commands.abilities import Abilities
from avlit.commands.adapted import root_of, stand_on
from avlit.commands.assembly import build_encoders, build_module, build_refiner
from avlit.commands.clips import to_frames
from avlit.commands.conditions import Conditions
from avlit.commands.control_files import read_video
from avlit.commands.plan import Plan, Window, plan_clip
from avlit.commands.request import Request
from avlit.commands.soundtrack import MIX_RATE_HZ
from avlit.config import Config, SampleConfig, from_yaml
from avlit.errors import UserError
from avlit.inherit import base_of, load_weights_into, resolve_weights
from avlit.media import MP4Writer, probe, read_audio, write_sound
from avlit.module import AVModule
from avlit.runs import Run, find_run
from avlit.sampling import Latents
from avlit.sound import fit, resample
from data.encode import Encoders

OnStep = Callable[[], None]


class Refiner(Protocol):
    """A recipe's second stage, which makes a draft of twice the height and width."""

    num_steps: int

    def __call__(
        self,
        batch: AVBatch,
        draft: Latents,
        *,
        seeds: Sequence[int],
        settings: SampleConfig,
        on_step: OnStep | None = None,
    ) -> Latents:
        """Conditions at the whole size, latents at half of it -> latents at the whole size."""
        ...


@dataclass(frozen=True)
class Piece:
    """What one window adds to a clip: frames uint8 [F, H, W, 3], F = 0 for sound alone; waveform float32 [N] of the
    same time at the generator's `rate_hz`, None where the clip has neither track nor generated sound."""

    frames: np.ndarray
    waveform: np.ndarray | None


@dataclass(frozen=True)
class GeneratedClip:
    """A whole clip: frames uint8 [F, H, W, 3] at `fps`, F = 0 for sound alone; waveform float32 [N] in [-1, 1] at
    `rate_hz`, both None for a clip without sound."""

    frames: np.ndarray
    fps: float
    waveform: np.ndarray | None
    rate_hz: int | None


class Generator:
    """Makes clips with a run's averaged weights and its own codecs, sizes and rates.

    `Generator.of_run("last")(Request(prompt="…", speech=Path("a.wav")))` is a clip in memory; `write` makes a file, an
    MP4 of any length in constant memory. The same request makes the same bits on the same machine.
    """

    def __init__(
        self,
        module: AVModule,
        encoders: Encoders,
        *,
        abilities: Abilities,
        settings: SampleConfig,
        refiner: Refiner | None = None,
    ) -> None:
        codec, timing = encoders.video, abilities.timing
        if codec and (codec.temporal_factor, codec.spatial_factor) != (timing.temporal_factor, timing.spatial_factor):
            raise UserError(
                f"codecs.video: this codec divides time by {codec.temporal_factor} and space by "
                f"{codec.spatial_factor}; clips are planned with {timing.temporal_factor} and {timing.spatial_factor}"
            )
        self.module, self.encoders, self.abilities, self.settings = module, encoders, abilities, settings
        self.timing, self.refiner = timing, refiner
        self.conditions = Conditions(encoders, abilities, device=module.device)

    @classmethod
    def of_run(cls, run: str | Path, *, runs_dir: Path | str = "runs", words: Sequence[str] = ()) -> Generator:
        """The newest checkpoint of `run` (`last`, an id, a folder). words: config keys, such as `sample.steps=20`."""
        found = find_run(Path(runs_dir), run)
        config = run_config(found, words)
        return cls.of_checkpoint(config, resolve_weights(found.path, runs_dir=Path(runs_dir)))

    @classmethod
    def of_checkpoint(cls, config: Config, checkpoint: Checkpoint) -> Generator:
        """A checkpoint of the run that `config` is of."""
        abilities, encoders = Abilities.of(config), build_encoders(config)
        module = load_trained(config, checkpoint)
        refiner = None if abilities.draft is None else build_refiner(config, module, encoders)
        return cls(module, encoders, abilities=abilities, settings=config.sample, refiner=refiner)

    @property
    def rate_hz(self) -> int:
        """Samples a second of the sound of all clips: sound alone stays as its codec makes it."""
        audio = self.encoders.audio
        return audio.rate_hz if audio is not None and not self.abilities.makes_video else MIX_RATE_HZ

    def plan(self, request: Request) -> Plan:
        """Check a request and lay it out; nothing is sampled yet."""
        return plan_clip(request, self.abilities)

    def __call__(self, request: Request, *, on_step: OnStep | None = None) -> GeneratedClip:
        """One clip with its sound, in memory; on_step is called after each of the sampler's steps."""
        pieces = list(self.pieces(self.plan(request), on_step=on_step))
        sounds = [piece.waveform for piece in pieces if piece.waveform is not None]
        return GeneratedClip(
            frames=np.concatenate([piece.frames for piece in pieces]),
            fps=self.timing.fps,
            waveform=np.concatenate(sounds) if sounds else None,
            rate_hz=self.rate_hz if sounds else None,
        )

    def write(self, plan: Plan, path: Path, *, on_step: OnStep | None = None) -> None:
        """Make the clip and write it, an MP4 while it is made; the file appears complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self.abilities.makes_video:
            (piece,) = self.pieces(plan, on_step=on_step)
            assert piece.waveform is not None
            write_sound(path, piece.waveform, rate_hz=self.rate_hz)
            return
        with self.writer(plan, path) as movie:
            for piece in self.pieces(plan, on_step=on_step):
                movie.write(piece.frames, piece.waveform)

    def writer(self, plan: Plan, path: Path) -> MP4Writer:
        """An MP4 that takes the plan's pieces."""
        rate_hz = MIX_RATE_HZ if plan.soundtrack.paths or self.abilities.makes_sound else None
        return MP4Writer(path, size=(self.timing.height, self.timing.width), fps=self.timing.fps, rate_hz=rate_hz)

    def num_steps(self, plan: Plan) -> int:
        """Steps of the sampler that a clip takes: how often on_step is called."""
        drafting = 0 if plan.draft is not None else self.settings.steps
        return len(plan.windows) * (drafting + (self.refiner.num_steps if self.refiner is not None else 0))

    def pieces(self, plan: Plan, *, on_step: OnStep | None = None) -> Iterator[Piece]:
        """Sample window after window; each is given the end of the one before, as its own codec encodes it."""
        end = None
        for window in plan.windows:
            latents = self._latents(window, plan, end, on_step)
            frames, end = self._frames(window, plan, latents.video)
            yield Piece(frames, self._sound(window, plan, latents.audio))

    def _latents(self, window: Window, plan: Plan, end: Tensor | None, on_step: OnStep | None) -> Latents:
        """What is sampled for the window, by one stage or two."""
        conditions, seeds = self.conditions, [window.seed]
        if self.refiner is not None and plan.draft is not None:
            draft = conditions.of_draft(plan)
        else:  # what a second stage follows is sampled at its own size
            batch, keyframes = conditions.of_window(window, plan, end, timing=self.abilities.draft)
            draft = self.module.sample(batch, seeds=seeds, settings=self.settings, keyframes=keyframes, on_step=on_step)
        if self.refiner is None:
            return draft
        batch, _ = conditions.of_window(window, plan, end)
        return self.refiner(batch, draft, seeds=seeds, settings=self.settings, on_step=on_step)

    @torch.no_grad()
    def _frames(self, window: Window, plan: Plan, latents: Tensor | None) -> tuple[np.ndarray, Tensor | None]:
        """What the window adds to the picture, uint8 [F, H, W, 3], and the last frames [3, F, H, W] for the next."""
        timing, codec = self.timing, self.encoders.video
        if plan.video is not None:  # its own frames, not what the codec makes of them
            return read_video(plan.video, timing)[: window.count], None
        if codec is None or latents is None:
            return np.zeros((0, timing.height, timing.width, 3), np.uint8), None
        video = codec.decode(latents.float()).clamp(-1, 1).cpu()[0]  # [3, F, H, W]
        end = video[:, -(1 + codec.temporal_factor) :]
        return to_frames(video[:, window.given : window.given + window.count]), end

    @torch.no_grad()
    def _sound(self, window: Window, plan: Plan, latents: Tensor | None) -> np.ndarray | None:
        """What the window adds to the sound, float32 [N] at `rate_hz`: generated, or else that of the tracks."""
        edges = (window.first_new, window.first_new + window.count)
        first, end = (round(frame / self.timing.fps * MIX_RATE_HZ) for frame in edges)
        codec = self.encoders.audio
        if plan.draft is not None:  # its own sound, not what the codec makes of it
            if probe(plan.draft).rate_hz is None:
                return np.zeros(end - first, np.float32)
            return fit(read_audio(plan.draft, MIX_RATE_HZ, duration_s=plan.duration_s, after_picture=True), end)[first:]
        if codec is None or latents is None:
            return plan.soundtrack.mix(first=first, count=end - first) if plan.soundtrack.paths else None
        sound = codec.decode(latents.float())[0].clamp(-1, 1).cpu().numpy()
        if not self.abilities.makes_video:
            return fit(sound, round(plan.duration_s * codec.rate_hz))
        return fit(np.clip(resample(sound, codec.rate_hz, MIX_RATE_HZ), -1.0, 1.0), end)[first:]

    def text_notes(self, request: Request) -> list[str]:
        """A remark for every prompt of which the text encoder reads a part only."""
        prompts = {"prompt": request.prompt, "audio_prompt": request.audio_prompt}
        prompts |= {f"prompt.{s:g}": text for s, text in request.later_prompts.items()}
        unread = {key: self.conditions.unread_words(text) for key, text in prompts.items() if text is not None}
        limit = self.encoders.text.max_tokens
        return [
            f"{key}: longer than the text encoder's {limit} tokens; not read: …{words}"
            for key, words in unread.items()
            if words
        ]


def run_config(run: Run, words: Sequence[str]) -> Config:
    """The run's config with further words over it."""
    return from_yaml(run.read_config(), words=words, source=str(run.config_path))


def load_trained(config: Config, checkpoint: Checkpoint) -> AVModule:
    """The run's module with the checkpoint's averaged weights, ready to sample on the device that the config names."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    module = build_module(config)
    if config.adapter.is_on:
        stand_on(module, config, root_of(checkpoint))
    elif config.model.weights:
        print(f"model.weights: {module.load_released(config.model.weights)}")
    elif module.base_names:
        print(module.load_base(base_of(checkpoint, module.base_names)))
    report = load_weights_into(module.model, checkpoint, ema=True, base_model=module.base_model)
    if untrained := [name for name in report.new if name not in module.released]:
        raise UserError(
            f"{checkpoint.path}: lacks {len(untrained)} tensors of this model, first {untrained[0]}; sample it "
            "with the model.* settings it was trained with, and model.weights=FOLDER if it began from released ones"
        )
    print(f"Step {checkpoint.step}: {replace(report, new=())}")  # what a base filled is not new
    return module.eval().to("cuda" if config.train.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
