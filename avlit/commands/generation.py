"""Generator: a trained run, loaded once, that makes any number of clips from requests; what `just sample` calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.checkpoints import Checkpoint
from avlit.commands.assembly import build_encoders, build_module
from avlit.commands.clips import to_frames
from avlit.commands.plan import Plan, Window, plan_clip
from avlit.commands.request import TRACK_KEYS, Request
from avlit.commands.soundtrack import MIX_RATE_HZ, Soundtrack
from avlit.config import Config, SampleConfig, from_yaml
from avlit.errors import UserError
from avlit.inherit import load_weights_into, resolve_weights
from avlit.media import MediaClip, MP4Writer, read_image
from avlit.module import AVModule
from avlit.runs import Run, find_run
from avlit.timing import Timing
from data.batches import Contents, collate
from data.encode import Encoders, track_features
from data.sample import CAPTION, Annotation, EncodedSample

OnStep = Callable[[], None]
KEPT_TEXTS = 16
"""Encoded prompts that are kept: one of T5's is 4 MB, and jobs bring thousands."""


@dataclass(frozen=True)
class Piece:
    """What one window adds to a clip: frames uint8 [F, H, W, 3]; waveform float32 [N] of the same time at 48 kHz, None
    where the clip has no track."""

    frames: np.ndarray
    waveform: np.ndarray | None


class Generator:
    """Makes clips with a run's averaged weights and its own codecs, sizes and rates.

    `Generator.of_run("last")(Request(prompt="…", speech=Path("a.wav")))` is a clip in memory; `write` makes an MP4 of
    any length in constant memory. The same request makes the same bits on the same machine. has_second: whether the
    model hears a second speaker.
    """

    def __init__(
        self,
        module: AVModule,
        encoders: Encoders,
        *,
        timing: Timing,
        settings: SampleConfig,
        has_second: bool = False,
    ) -> None:
        codec = encoders.video
        assert codec is not None
        if (codec.temporal_factor, codec.spatial_factor) != (timing.temporal_factor, timing.spatial_factor):
            raise UserError(
                f"codecs.video: this codec divides time by {codec.temporal_factor} and space by "
                f"{codec.spatial_factor}; clips are planned with {timing.temporal_factor} and {timing.spatial_factor}"
            )
        self.module, self.encoders, self.timing, self.settings = module, encoders, timing, settings
        self.has_second = has_second
        self._texts: dict[str, np.ndarray] = {}
        self._silence: np.ndarray | None = None

    @classmethod
    def of_run(cls, run: str | Path, *, runs_dir: Path | str = "runs", words: Sequence[str] = ()) -> Generator:
        """The newest checkpoint of `run` (`last`, an id, a folder). words: config keys, such as `sample.steps=20`."""
        found = find_run(Path(runs_dir), run)
        config = run_config(found, words)
        return cls.of_checkpoint(config, resolve_weights(found.path, runs_dir=Path(runs_dir)))

    @classmethod
    def of_checkpoint(cls, config: Config, checkpoint: Checkpoint) -> Generator:
        """A checkpoint of the run that `config` is of."""
        return cls(
            load_trained(config, checkpoint),
            build_encoders(config),
            timing=config.timing,
            settings=config.sample,
            has_second=has_second_speaker(config),
        )

    def plan(self, request: Request) -> Plan:
        """Check a request and lay it out; nothing is sampled yet."""
        return plan_clip(request, timing=self.timing, has_second=self.has_second)

    def __call__(self, request: Request, *, on_step: OnStep | None = None) -> MediaClip:
        """One clip with its sound (48 kHz), in memory; on_step is called after each of the sampler's steps."""
        pieces = list(self.pieces(self.plan(request), on_step=on_step))
        sounds = [piece.waveform for piece in pieces if piece.waveform is not None]
        return MediaClip(
            frames=np.concatenate([piece.frames for piece in pieces]),
            fps=self.timing.fps,
            waveform=np.concatenate(sounds) if sounds else None,
            rate_hz=MIX_RATE_HZ if sounds else None,
        )

    def write(self, plan: Plan, path: Path, *, on_step: OnStep | None = None) -> None:
        """Make the clip and write it while it is made; the file appears complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.writer(plan, path) as movie:
            for piece in self.pieces(plan, on_step=on_step):
                movie.write(piece.frames, piece.waveform)

    def writer(self, plan: Plan, path: Path) -> MP4Writer:
        """An MP4 that takes the plan's pieces."""
        rate_hz = MIX_RATE_HZ if plan.soundtrack.paths else None
        return MP4Writer(path, size=(self.timing.height, self.timing.width), fps=self.timing.fps, rate_hz=rate_hz)

    def num_steps(self, plan: Plan) -> int:
        """Steps of the sampler that a clip takes: how often on_step is called."""
        return len(plan.windows) * self.settings.steps

    def pieces(self, plan: Plan, *, on_step: OnStep | None = None) -> Iterator[Piece]:
        """Sample window after window; each is given the end of the one before, as its own codec encodes it."""
        codec, end = self.encoders.video, None
        assert codec is not None
        for window in plan.windows:
            batch, keyframes = self._conditions(window, plan.soundtrack, end)
            latents = self.module.sample(
                batch,
                seeds=[window.seed],
                settings=self.settings,
                keyframes=keyframes if keyframes.any() else None,
                on_step=on_step,
            )
            assert latents.video is not None
            with torch.no_grad():
                video = codec.decode(latents.video.float()).clamp(-1, 1).cpu()[0]  # [3, F, H, W]
            end = video[:, -(1 + codec.temporal_factor) :]  # the last frames, for the next window
            frames = to_frames(video[:, window.given : window.given + window.count])
            yield Piece(frames, self._sound(window, plan.soundtrack))

    def _sound(self, window: Window, soundtrack: Soundtrack) -> np.ndarray | None:
        if not soundtrack.paths:
            return None
        edges = (window.first_new, window.first_new + window.count)
        first, end = (round(frame / self.timing.fps * MIX_RATE_HZ) for frame in edges)
        return soundtrack.mix(first=first, count=end - first)

    @torch.no_grad()
    def _conditions(self, window: Window, soundtrack: Soundtrack, end: Tensor | None) -> tuple[AVBatch, Tensor]:
        """The window's batch [1, ...] as training makes it, and which latent frames of it are given, bool [1, T].

        end [3, 1 + temporal_factor, H, W]: the frames that the window before ended with.
        """
        timing, encoders = self.timing, self.encoders
        assert encoders.video is not None
        latents = torch.zeros(encoders.video.channels, timing.latent_frames, *timing.latent_size)
        keyframes = torch.zeros(1, timing.latent_frames, dtype=torch.bool)
        if window.given:
            assert end is not None
            latents[:, :2] = encoders.video.encode(end[None].to(self.module.device))[0].cpu()
            keyframes[:, :2] = True
        for latent, path in window.images.items():
            latents[:, latent] = self._image_latent(path, is_first=latent == 0)
            keyframes[:, latent] = True
        tracks = {name: self._features(name, window, soundtrack) for name in TRACK_KEYS}
        sample = EncodedSample(
            key="request",
            annotation=Annotation(
                caption=window.prompt or "",
                transcript="",
                subset="",
                fps=timing.fps,
                rate_hz=timing.rate_hz,
                num_frames=timing.num_frames,
                height=timing.height,
                width=timing.width,
            ),
            video_latents=latents.numpy(),
            texts={CAPTION: self._text(window.prompt)},
            speech=tracks["speech"],
            effects=tracks["effects"],
            music=tracks["music"],
            speech_second=tracks["speech_second"] if "speech_second" in soundtrack.paths else None,
        )
        batch = collate([sample], step=0, slots=(0,), contents=Contents(text_tokens=encoders.text.max_tokens))
        return batch.to(self.module.device), keyframes.to(self.module.device)

    def _image_latent(self, path: Path, *, is_first: bool) -> Tensor:
        """The latent frame [C, h, w] of a still picture.

        A latent frame after the first holds `temporal_factor` frames, all of which are taken to show the picture; and
        a causal codec looks back, so the frames before are taken to show it, too. Both are approximations: the model
        holds the picture for that long.
        """
        timing, codec = self.timing, self.encoders.video
        assert codec is not None
        pixels = torch.from_numpy(read_image(path, size=(timing.height, timing.width)))
        picture = pixels.permute(2, 0, 1).float().div(127.5).sub(1)  # [3, H, W]
        still = picture[:, None].expand(-1, 1 + codec.temporal_factor, -1, -1)  # two latent frames
        return codec.encode(still[None].to(self.module.device))[0, :, 0 if is_first else 1].float().cpu()

    def _features(self, name: str, window: Window, soundtrack: Soundtrack) -> np.ndarray:
        """Features [F, K, D] of a track in the window's time, as shards hold them."""
        timing, encoder = self.timing, self.encoders.tracks
        assert encoder is not None
        if name not in soundtrack.paths and self._silence is not None:
            return self._silence
        first = round(window.start / timing.fps * timing.rate_hz)
        sound = soundtrack.track(name, rate_hz=timing.rate_hz, first=first, count=timing.num_samples)
        features = track_features(sound, rate_hz=timing.rate_hz, encoder=encoder, num_frames=timing.num_frames)
        if name not in soundtrack.paths:
            self._silence = features
        return features

    def _text(self, prompt: str | None) -> np.ndarray:
        if prompt is None:
            return np.zeros((0, self.encoders.text.dim), np.float32)
        if prompt not in self._texts:
            if len(self._texts) >= KEPT_TEXTS:
                self._texts.clear()
            self._texts[prompt] = self.encoders.text.encode(prompt).float().numpy()
        return self._texts[prompt]

    def text_notes(self, request: Request) -> list[str]:
        """A remark for every prompt of which the text encoder reads a part only."""
        prompts = {"prompt": request.prompt} | {f"prompt.{s:g}": text for s, text in request.later_prompts.items()}
        unread = {key: self.unread_words(text) for key, text in prompts.items() if text is not None}
        limit = self.encoders.text.max_tokens
        return [
            f"{key}: longer than the text encoder's {limit} tokens; not read: …{words}"
            for key, words in unread.items()
            if words
        ]

    def unread_words(self, prompt: str) -> str:
        """The end of a prompt that the text encoder cuts off; empty where it reads all."""
        words, full = prompt.split(), self._text(prompt)

        def is_read_whole(count: int) -> bool:
            part = self.encoders.text.encode(" ".join(words[:count])).float().numpy()
            return np.array_equal(part, full)

        if len(words) < 2 or not is_read_whole(len(words) - 1):
            return ""
        low, high = 0, len(words) - 1  # the first `high` words are all that is read; the first `low` are not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_read_whole(middle) else (middle, high)
        return " ".join(words[high:])


def run_config(run: Run, words: Sequence[str]) -> Config:
    """The run's config with further words over it."""
    return from_yaml(run.read_config(), words=words, source=str(run.config_path))


def has_second_speaker(config: Config) -> bool:
    """Whether the run's model has a track for a second speaker; recipes without such a key have none."""
    return bool(getattr(config.model, "second_speaker", False))


def load_trained(config: Config, checkpoint: Checkpoint) -> AVModule:
    """The run's module with the checkpoint's averaged weights, ready to sample on the device that the config names."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    module = build_module(config)
    if config.model.weights:
        print(f"model.weights: {module.load_released(config.model.weights)}")
    report = load_weights_into(module.model, checkpoint, ema=True, base_model=module.base_model)
    if untrained := [name for name in report.new if name not in module.released]:
        raise UserError(
            f"{checkpoint.path}: lacks {len(untrained)} tensors of this model, first {untrained[0]}; sample it "
            "with the model.* settings it was trained with, and model.weights=FOLDER if it began from released ones"
        )
    print(f"Step {checkpoint.step}: {report}")
    return module.eval().to("cuda" if config.train.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
