"""What a run's model can be asked for, as its config says: the words it takes, and how long its clips are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from avlit.commands.request import CONTROL_KEYS, Request
from avlit.config import Config
from avlit.errors import UserError
from avlit.timing import AUDIO_LATENTS_PER_S, Timing
from data.captions import PROMPT, split_visual_speech

CONTINUES = "prompt.SECONDS"
"""The word of recipes that make a long clip window by window."""

ENLARGED = 2
"""What a second stage multiplies height and width by."""


@dataclass(frozen=True)
class Abilities:
    """The limits of requests to one run.

    recipe: its key, for messages. accepts: the words that say what a clip shows or sounds like and that the recipe's
    sampler can use. timing: of the clips that it makes at a time. clip_s: how long those are. has_second: the model
    hears a second speaker. latents_per_s: of the sound that it makes, 0 where it makes none. reference_s: seconds of a
    reference sound that it reads. has_prompt_form: prompts are `[VISUAL]: … [SPEECH]: …`. draft: where a second stage
    enlarges and refines, the timing of what it refines; is_draft_given: that is the `video=` of the request. idle:
    words that a scale of 0 takes all effect from -> its key.
    """

    recipe: str
    accepts: tuple[str, ...]
    timing: Timing
    clip_s: float
    has_second: bool = False
    makes_video: bool = True
    latents_per_s: float = 0.0
    reference_s: float = 0.0
    has_prompt_form: bool = False
    draft: Timing | None = None
    is_draft_given: bool = False
    idle: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> Abilities:
        """What a run of `config` can do; UserError where its clips' length is to be read from shards that are gone."""
        makes_video = config.codecs.video != "none"
        latents_per_s = AUDIO_LATENTS_PER_S.get(config.codecs.audio, 0.0)
        timing, stages = config.timing, getattr(config.sample, "stages", "first")  # recipes without such a key have one
        if stages != "first":
            timing = replace(timing, height=ENLARGED * timing.height, width=ENLARGED * timing.width)
        return cls(
            recipe=config.recipe,
            accepts=config.accepts,
            timing=timing,
            clip_s=config.timing.duration_s if makes_video else longest_sound_s(config),
            has_second=bool(getattr(config.model, "second_speaker", False)),  # recipes without such a key have none
            makes_video=makes_video,
            latents_per_s=latents_per_s,
            reference_s=config.reads.reference_tokens / latents_per_s if latents_per_s else 0.0,
            has_prompt_form=config.reads.captions == (PROMPT,),
            draft=None if stages == "first" else config.timing,
            is_draft_given=stages == "second",
            idle={
                word: f"sample.{key}"
                for key, words in (("visual_scale", CONTROL_KEYS), ("acoustic_scale", ("reference",)))
                if getattr(config.sample, key, 1.0) == 0  # recipes without such a key scale nothing
                for word in words
            },
        )

    @property
    def has_audio_prompt(self) -> bool:
        """Whether what is heard has a prompt of its own."""
        return "audio_prompt" in self.accepts

    @property
    def makes_sound(self) -> bool:
        """Whether a clip's sound is generated; otherwise it is that of its tracks."""
        return self.latents_per_s > 0

    @property
    def continues(self) -> bool:
        """Whether clips may be longer than those of the training, each window going on from the one before."""
        return CONTINUES in self.accepts

    @property
    def suffix(self) -> str:
        """Of the files that clips are written to."""
        return ".mp4" if self.makes_video else ".wav"

    def refuse_others(self, request: Request) -> None:
        """Raise UserError for a word of the request that the sampler would not use."""
        for word, value in request.contents.items():
            name, _, place = word.partition(".")
            if word in self.accepts or (place and {f"{name}.SECONDS", f"{name}.FRAME"} & {*self.accepts}):
                continue
            raise UserError(f"{word}={value}: {self.recipe} takes {', '.join(self.accepts)}; leave it out")
        if request.speech_second is not None and not self.has_second:
            raise UserError(
                f"speech_second={request.speech_second}: this run's model has no second speaker; sample a run that was "
                "trained with model.second_speaker=true, such as one of stage 3"
            )
        if request.video is not None and request.images:
            raise UserError(f"video={request.video}: gives every frame; leave image.FRAME= out")
        if self.is_draft_given and request.video is None:
            raise UserError("sample.stages=second: refines a clip; give it as video=FILE, or choose sample.stages=both")
        self._refuse_form(request)

    def _refuse_form(self, request: Request) -> None:
        if request.free_prompts and not self.has_prompt_form:
            raise UserError(f"free_prompts=true: {self.recipe} takes prompts of any form; leave it out")
        if request.prompt is None or request.free_prompts or not self.has_prompt_form:
            return
        try:
            split_visual_speech(request.prompt)
        except ValueError as error:
            raise UserError(
                f"prompt={error}, as the model was trained; free_prompts=true takes others as they are"
            ) from error

    def refuse_length(self, duration_s: float) -> None:
        """Raise UserError for a clip that is longer than the model was trained to make, or shorter than one latent."""
        if duration_s > self.clip_s + 1e-6 and not self.continues:
            raise UserError(
                f"duration_s={duration_s:g}: the model of this run was trained on clips of {self.clip_s:.3f} s, and "
                f"{self.recipe} does not go on from one; at most {self.clip_s:.3f}"
            )
        if not self.makes_video and duration_s * self.latents_per_s < 1:
            raise UserError(
                f"duration_s={duration_s:g}: is shorter than one of the {self.latents_per_s:g} latents a second that "
                "sound is made of"
            )


def longest_sound_s(config: Config) -> float:
    """Seconds of the longest clips that a run on sound alone was trained on: of its shards, or of the corpus's."""
    if config.data.root is None:
        return config.timing.duration_s
    from data.shards import ShardSet  # not for the corpus: listings must not wait for it

    shards = ShardSet.open([Path(part) for part in config.data.root.split(",")])
    trained = [shard for _, shard in shards.select("train") if shard.subset in (config.data.subsets or shards.subsets)]
    if not trained:
        raise UserError(f"data.root={config.data.root}: holds no training clips, whose length the model would make")
    return max(_seconds(shard.shape, fps=config.data.fps) for shard in trained)


def _seconds(shape: str, *, fps: float) -> float:
    """Of a bucket's clips: `640ms`, or `FxHxW` in frames and pixels."""
    return int(shape.removesuffix("ms")) / 1000 if shape.endswith("ms") else int(shape.partition("x")[0]) / fps
