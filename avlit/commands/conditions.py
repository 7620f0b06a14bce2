"""What the model is given for a window of a clip: text, tracks, pictures, video and voice, as training's batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from avlit.batch import AVBatch
from avlit.codecs.blank import silence_latents
from avlit.commands.abilities import Abilities
from avlit.commands.control_files import read_held, read_reference_image
from avlit.commands.plan import Plan, Window
from avlit.commands.request import TRACK_KEYS
from avlit.media import probe, read_audio, read_image
from avlit.sampling import Latents
from avlit.sound import fit, gain_to_peak
from avlit.timing import Timing
from data.batches import Contents, collate
from data.encode import Encoders, picture_latents, sound_latents, track_features
from data.sample import CAPTION, Annotation, EncodedSample

KEPT_TEXTS = 16
"""Encoded prompts that are kept: one of T5's is 4 MB, and jobs bring thousands."""
HEARD = "speech"
"""The style of what is heard (data/captions.py)."""
LEAD_OUT_S = 1.0
"""Seconds of a reference that are read beyond what is used, for codecs that look ahead."""


class Conditions:
    """Encodes what windows are given, through the codecs that the shards were made with."""

    def __init__(self, encoders: Encoders, abilities: Abilities, *, device: torch.device) -> None:
        self.encoders, self.abilities, self.timing, self.device = encoders, abilities, abilities.timing, device
        self.reference_s, self.has_audio_prompt = abilities.reference_s, abilities.has_audio_prompt
        self._texts: dict[str, np.ndarray] = {}
        self._silence: np.ndarray | None = None

    @torch.no_grad()
    def of_window(
        self, window: Window, plan: Plan, end: Tensor | None, *, timing: Timing | None = None
    ) -> tuple[AVBatch, Tensor | None]:
        """The window's batch [1, ...] as training makes it, and which latent frames of it are given, bool [1, T].

        end [3, 1 + temporal_factor, H, W]: the frames that the window before ended with. None is given where the video
        is all generated, or there is none. timing: of another height and width than the clip's.
        """
        timing, encoders = timing or self.timing, self.encoders
        video, keyframes = self._video(window, plan, end, timing)
        audio, references = None, ()
        if encoders.audio is not None:
            # what is generated is as long as the clips that the model knows; a shorter video is cut afterwards
            duration_s = plan.duration_s if video is None else timing.duration_s
            audio = np.zeros((encoders.audio.num_latents(duration_s), encoders.audio.channels), np.float32)
            references = (self._reference(plan),) if plan.reference is not None else ()
        has_tracks = encoders.tracks is not None
        tracks = {name: self._features(name, window, plan) for name in TRACK_KEYS} if has_tracks else {}
        if "speech_second" not in plan.soundtrack.paths:
            tracks.pop("speech_second", None)
        has_video = video is not None
        heard = {HEARD: self.text(plan.audio_prompt)} if self.has_audio_prompt else {}
        sample = EncodedSample(
            key="request",
            annotation=Annotation(
                caption=window.prompt or "",
                transcript="",
                subset="",
                fps=timing.fps,
                rate_hz=timing.rate_hz,
                num_frames=timing.num_frames if has_video else 0,
                height=timing.height if has_video else 0,
                width=timing.width if has_video else 0,
                duration_s=0.0 if has_video else plan.duration_s,
                captions={style: plan.audio_prompt or "" for style in heard},
            ),
            video_latents=video,
            audio_latents=audio,
            texts={CAPTION: self.text(window.prompt), **heard},
            references=references,
            **tracks,
            **self._controls(plan, timing),
        )
        contents = Contents(
            text_tokens=encoders.text.max_tokens,
            audio_captions=tuple(heard),
            video=has_video,
            audio=audio is not None,
            tracks=has_tracks,
            reference_tokens=encoders.reference_tokens,
            controls=encoders.controls,
        )
        batch = collate([sample], step=0, slots=(0,), contents=contents).to(self.device)
        return batch, keyframes.to(self.device) if keyframes.any() else None

    @torch.no_grad()
    def of_draft(self, plan: Plan) -> Latents:
        """The video that is refined, with its sound or silence, as latents [1, ...] of the draft's size."""
        timing, (video, audio) = self.abilities.draft, (self.encoders.video, self.encoders.audio)
        assert plan.draft is not None and timing is not None and video is not None and audio is not None
        num_latents = audio.num_latents(timing.duration_s)
        if probe(plan.draft).rate_hz is None:
            sound = silence_latents(audio, num_latents)[0]
        else:
            heard = read_audio(plan.draft, audio.rate_hz, duration_s=timing.duration_s, after_picture=True)
            heard = fit(heard, round(timing.duration_s * audio.rate_hz))
            heard = heard * gain_to_peak(heard, self.encoders.peak)
            sound = torch.from_numpy(sound_latents(heard, rate_hz=audio.rate_hz, codec=audio)[:num_latents])
        frames = picture_latents(read_held(plan.draft, timing), codec=video)
        return Latents(video=torch.from_numpy(frames)[None].to(self.device), audio=sound[None].to(self.device))

    def _controls(self, plan: Plan, timing: Timing) -> dict[str, np.ndarray]:
        """Latents of the reference image [C, 1, h, w] and of depth or pose [C, T, h, w], those that are given."""
        codec = self.encoders.video
        found = {}
        for name, path in plan.controls.items():
            assert codec is not None
            is_still = name == "reference_image"
            frames = read_reference_image(path, timing)[None] if is_still else read_held(path, timing)
            found[name] = picture_latents(frames, codec=codec)
        return found

    def _video(
        self, window: Window, plan: Plan, end: Tensor | None, timing: Timing
    ) -> tuple[np.ndarray | None, Tensor]:
        """Latents [C, T, h, w], zeros where they are not given, and which frames are, bool [1, T]."""
        codec = self.encoders.video
        keyframes = torch.zeros(1, timing.latent_frames, dtype=torch.bool)
        if codec is None:
            return None, keyframes
        if plan.video is not None:
            video = _to_video(read_held(plan.video, timing))
            return codec.encode(video[None].to(self.device))[0].float().cpu().numpy(), ~keyframes
        latents = torch.zeros(codec.channels, timing.latent_frames, *timing.latent_size)
        if window.given:
            assert end is not None
            latents[:, :2] = codec.encode(end[None].to(self.device))[0].cpu()
            keyframes[:, :2] = True
        for latent, path in window.images.items():
            still = _to_video(read_image(path, size=(timing.height, timing.width))[None])
            latents[:, latent] = self._still_latent(still, is_first=latent == 0)
            keyframes[:, latent] = True
        return latents.numpy(), keyframes

    def _still_latent(self, picture: Tensor, *, is_first: bool) -> Tensor:
        """The latent frame [C, h, w] of a still picture [3, 1, H, W].

        A latent frame after the first holds `temporal_factor` frames, all of which are taken to show the picture; and
        a causal codec looks back, so the frames before are taken to show it, too. Both are approximations: the model
        holds the picture for that long.
        """
        codec = self.encoders.video
        assert codec is not None
        still = picture.expand(-1, 1 + codec.temporal_factor, -1, -1)  # two latent frames
        return codec.encode(still[None].to(self.device))[0, :, 0 if is_first else 1].float().cpu()

    def _features(self, name: str, window: Window, plan: Plan) -> np.ndarray:
        """Features [F, K, D] of a track in the window's time, as shards hold them."""
        timing, encoder, soundtrack = self.timing, self.encoders.tracks, plan.soundtrack
        assert encoder is not None
        if name not in soundtrack.paths and self._silence is not None:
            return self._silence
        first = round(window.start / timing.fps * timing.rate_hz)
        sound = soundtrack.track(name, rate_hz=timing.rate_hz, first=first, count=timing.num_samples)
        features = track_features(sound, rate_hz=timing.rate_hz, encoder=encoder, num_frames=timing.num_frames)
        if name not in soundtrack.paths:
            self._silence = features
        return features

    def _reference(self, plan: Plan) -> np.ndarray:
        """Latents [R, C] of the reference's beginning, as shards hold them; at most as many as the model reads."""
        codec, rate_hz = self.encoders.audio, self.timing.rate_hz
        assert codec is not None and plan.reference is not None
        sound = read_audio(plan.reference, rate_hz, duration_s=self.reference_s + LEAD_OUT_S)
        used = sound[: round(self.reference_s * rate_hz)]  # whatever follows has no say
        louder = sound * gain_to_peak(used, self.encoders.peak)
        return sound_latents(louder, rate_hz=rate_hz, codec=codec)[: self.encoders.reference_tokens]

    def text(self, prompt: str | None) -> np.ndarray:
        """Features [L, D] of a prompt; none of them without one, as training's text dropout leaves it."""
        if prompt is None:
            return np.zeros((0, self.encoders.text.dim), np.float32)
        if prompt not in self._texts:
            if len(self._texts) >= KEPT_TEXTS:
                self._texts.clear()
            self._texts[prompt] = self.encoders.text.encode(prompt).float().numpy()
        return self._texts[prompt]

    def unread_words(self, prompt: str) -> str:
        """The end of a prompt that the text encoder cuts off; empty where it reads all."""
        words, full = prompt.split(), self.text(prompt)

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


def _to_video(frames: np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] -> [3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float().div(127.5).sub(1)
