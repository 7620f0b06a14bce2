"""Sizes of the models as plain values, importable without torch so that configs print and help answers at once."""

from dataclasses import dataclass
from typing import Literal, get_args

VARIANTS = ("cogvideox", "wan")

Fusion = Literal["joint", "cross_linear", "cross"]
"""How the branches of video and sound meet in a block, see `mmdit_block.fuse` (JoVA, Table 5)."""


@dataclass
class MSTControlNetConfig:
    """MTV's MST-ControlNet and its backbone. The defaults are the paper's size: CogVideoX-5B-I2V and MTV's own sizes.

    "5B-I2V" below is the config.json of the released CogVideoX-5B-I2V transformer; "MTV" the paper (arXiv 2506.08003)
    and its published code; "chosen" a value that neither gives.
    """

    variant: str = "cogvideox"  # or "wan": the same control after Wan's text cross-attention (MTV, sec. 5.4)

    # The backbone.
    num_layers: int = 42  # 5B-I2V
    num_heads: int = 48  # 5B-I2V
    head_dim: int = 64  # 5B-I2V
    in_channels: int = 32  # 5B-I2V: out_channels latents, the rest image conditioning, which MTV keeps at zero
    out_channels: int = 16  # 5B-I2V
    patch_size: int = 2  # 5B-I2V; in space only
    text_dim: int = 4096  # 5B-I2V: T5 v1.1 xxl
    max_text_tokens: int = 226  # 5B-I2V; Wan: 512. Shorter prompts are padded with zero features
    time_embed_dim: int = 512  # 5B-I2V; Wan takes its width instead
    sample_height: int = 60  # 5B-I2V, latent cells (480 pixels); positions of other sizes are resized from this one
    sample_width: int = 90  # 5B-I2V, latent cells (720 pixels)
    sample_frames: int = 49  # 5B-I2V, pixel frames (13 latent frames)
    temporal_factor: int = 4  # 5B-I2V: pixel frames of one latent frame
    learned_positions: bool = True  # 5B-I2V: a position table beside the rotary embedding; 5B has none
    wan_ffn_dim: int = 13824  # Wan2.1-14B; CogVideoX always takes four times its width
    wan_freq_dim: int = 256  # Wan2.1-14B

    # Track encoders and the interval stream.
    audio_layers: int = 12  # MTV: hidden layers of wav2vec2-base
    audio_dim: int = 768  # MTV: width of those layers
    audio_window: int = 2  # MTV code: neighbouring frames on each side that a frame's tokens see
    audio_hidden: int = 512  # MTV code: width of the two hidden linear layers
    audio_tokens: int = 32  # MTV code: tokens of one track and interval
    control_dim: int = 768  # MTV code: width of those tokens
    conv_groups: int = 1  # MTV code; 32 (one group a token) shrinks the three convolutions from 3.6 B to 0.1 B: chosen
    num_interaction_blocks: int = 4  # MTV, sec. 7.2: N
    interaction_heads: int = 48  # MTV code

    # Second speaker and ablations.
    second_speaker: bool = False  # MTV code, multiple characters: a second speech track with its own cross-attention
    separate_extraction: bool = True  # MTV, sec. 5.2; False (W/o SE): music joins the interval interaction blocks
    separate_injection: bool = True  # MTV, sec. 5.2; False (W/o SI): all tracks through one shared cross-attention

    @property
    def inner_dim(self) -> int:
        """Width of the backbone."""
        return self.num_heads * self.head_dim

    @property
    def temb_dim(self) -> int:
        """Width of the time embedding that modulates the interaction blocks."""
        return self.inner_dim if self.variant == "wan" else self.time_embed_dim

    @property
    def interval_tracks(self) -> tuple[str, ...]:
        """Tracks that pass the interval interaction blocks, in the order of their tokens."""
        second = ("speech_second",) if self.second_speaker else ()
        music = () if self.separate_extraction else ("music",)
        return ("speech", *second, "effects", *music)

    @property
    def injections(self) -> tuple[str, ...]:
        """Names of the cross-attentions of one layer."""
        return self.interval_tracks if self.separate_injection else ("merged",)

    @property
    def has_style(self) -> bool:
        """Whether music modulates whole clips (Eq. 3); both ablations feed it to cross-attention instead."""
        return self.separate_extraction and self.separate_injection

    def check(self) -> None:
        """Raise ValueError for values that no model can have; messages name the key as the command line does."""
        if self.variant not in VARIANTS:
            raise ValueError(f"model.variant={self.variant!r}: must be one of {', '.join(VARIANTS)}")
        for key in ("num_layers", "num_heads", "audio_layers", "audio_dim", "audio_hidden", "audio_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)}: must be at least 1")
        for key in ("audio_window", "num_interaction_blocks"):
            if getattr(self, key) < 0:
                raise ValueError(f"model.{key}={getattr(self, key)}: must be 0 or more")
        if self.in_channels < self.out_channels:
            raise ValueError(
                f"model.in_channels={self.in_channels}: must be at least model.out_channels={self.out_channels}, "
                "the video codec's latent channels"
            )
        if self.temporal_factor != 4:
            raise ValueError(
                f"model.temporal_factor={self.temporal_factor}: the track encoder halves the frames twice, so only 4 "
                "fits; use a video codec with 4 frames a latent"
            )
        if self.control_dim % self.interaction_heads:
            raise ValueError(
                f"model.control_dim={self.control_dim}: must be a multiple of "
                f"model.interaction_heads={self.interaction_heads}"
            )
        if (self.audio_tokens * self.control_dim) % self.conv_groups:
            raise ValueError(
                f"model.conv_groups={self.conv_groups}: must divide model.audio_tokens * model.control_dim = "
                f"{self.audio_tokens * self.control_dim}"
            )
        # Rotary pairs: CogVideoX splits a head 2/8, 3/8, 3/8 over time, height and width, each in pairs.
        if self.variant == "cogvideox" and self.head_dim % 16:
            raise ValueError(f"model.head_dim={self.head_dim}: must be a multiple of 16 for the rotary embedding")
        if self.variant == "wan" and self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim}: must be even for the rotary embedding")


def wan_14b() -> MSTControlNetConfig:
    """MTV's Wan14B variant (sec. 5.4): Wan2.1-T2V-14B with the same control."""
    return MSTControlNetConfig(
        variant="wan",
        num_layers=40,
        num_heads=40,
        head_dim=128,
        in_channels=16,
        out_channels=16,
        max_text_tokens=512,
    )


@dataclass
class TwinWanConfig:
    """Twin Wan transformers, one for video and one for sound. The defaults are UniTalking's size.

    "TI2V-5B" below is the config.json of the released Wan2.2-TI2V-5B transformer; "UniTalking" the paper
    (arXiv 2603.01418); "chosen" a value that neither gives.
    """

    # Both twins.
    num_layers: int = 30  # TI2V-5B
    num_heads: int = 24  # TI2V-5B
    head_dim: int = 128  # TI2V-5B
    ffn_dim: int = 14336  # TI2V-5B
    freq_dim: int = 256  # TI2V-5B: width of the sinusoidal time embedding
    text_dim: int = 4096  # TI2V-5B: UMT5-xxl
    max_text_tokens: int = 512  # UniTalking, sec. 4.3; shorter prompts are padded with zero features
    max_reference_tokens: int = 257  # UniTalking, sec. 4.3; shorter reference sound is padded with zeros

    # The video twin's ends.
    video_channels: int = 48  # TI2V-5B, in and out: latents of the Wan2.2 codec
    patch_size: int = 2  # TI2V-5B; in space only

    # The audio twin's ends.
    audio_channels: int = 40  # UniTalking, sec. 4.3: latents of MMAudio's 44.1 kHz codec
    audio_kernel: int = 7  # chosen, as Ovi: audio latents that each of the stem's two convolutions sees

    @property
    def inner_dim(self) -> int:
        """Width of both twins."""
        return self.num_heads * self.head_dim

    def check(self) -> None:
        """Raise ValueError for values that no model can have; messages name the key as the command line does."""
        positive = (
            "num_layers", "num_heads", "head_dim", "ffn_dim", "freq_dim", "text_dim", "max_text_tokens",
            "max_reference_tokens", "video_channels", "patch_size", "audio_channels", "audio_kernel",
        )  # fmt: skip
        for key in positive:
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)}: must be at least 1")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim}: must be even for the rotary embedding")
        if self.freq_dim % 2:
            raise ValueError(f"model.freq_dim={self.freq_dim}: must be even, half sines and half cosines")
        if self.audio_kernel % 2 == 0:
            raise ValueError(f"model.audio_kernel={self.audio_kernel}: must be odd, so that it is centred on a latent")


@dataclass
class TwinMMDiTConfig:
    """Twin MM-DiTs, one for video and one for sound. The defaults are JoVA's larger size, on Waver-12B.

    "Waver" below is Waver's README (its weights are not public); "HunyuanVideo" the config.json of the released
    HunyuanVideo transformer, whose blocks these are; "JoVA" the paper (arXiv 2512.13677); "chosen" what none gives.
    """

    # Both branches.
    num_layers: int = 16  # Waver: dual-stream blocks, whose text has weights of its own
    num_single_layers: int = 40  # Waver: single-stream blocks after them
    num_heads: int = 24  # Waver
    head_dim: int = 128  # Waver
    mlp_ratio: float = 4.0  # HunyuanVideo: width of a block's feed-forward, in widths of the block
    num_refiner_layers: int = 2  # HunyuanVideo: blocks that only text passes, at first
    text_dim: int = 4096  # chosen: one encoder, with the width of Waver's first (flan-t5-xxl); HunyuanVideo: the same
    pooled_dim: int | None = None  # chosen: None, the mean of the text takes its place; HunyuanVideo: 768, CLIP's
    embedded_guidance: float | None = None  # scale told to weights that were distilled with it; Waver: none
    rope_theta: float = 256.0  # HunyuanVideo
    rope_axes: tuple[int, int, int] = (16, 56, 56)  # HunyuanVideo: of a head, for time, height and width

    # The video branch's ends.
    video_channels: int = 16  # Waver, in and out: latents of the Wan2.1 codec
    image_channels: int = 20  # Waver: latents of a reference image (16) and its mask (4); 0 takes no image
    patch_size: int = 2  # HunyuanVideo; in space only

    # The audio branch's ends.
    audio_channels: int = 40  # chosen, JoVA has either: latents of MMAudio's 44.1 kHz codec

    # What JoVA compares.
    fusion: Fusion = "joint"  # JoVA, Table 5
    aligned_rope: bool = True  # JoVA, Table 4: sound on the video's time axis; False counts its latents instead

    @property
    def inner_dim(self) -> int:
        """Width of both branches."""
        return self.num_heads * self.head_dim

    def check(self) -> None:
        """Raise ValueError for values that no model can have; messages name the key as the command line does."""
        positive = (
            "num_layers", "num_single_layers", "num_heads", "head_dim", "num_refiner_layers", "text_dim",
            "video_channels", "patch_size", "audio_channels",
        )  # fmt: skip
        for key in positive:
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)}: must be at least 1")
        for key in ("mlp_ratio", "rope_theta"):
            if not getattr(self, key) > 0:
                raise ValueError(f"model.{key}={getattr(self, key):g}: must be positive")
        if self.pooled_dim is not None and self.pooled_dim < 1:
            raise ValueError(f"model.pooled_dim={self.pooled_dim}: must be at least 1, or null for the text's mean")
        if len(self.rope_axes) != 3 or any(axis < 2 or axis % 2 for axis in self.rope_axes):
            raise ValueError(f"model.rope_axes={list(self.rope_axes)}: must be three even numbers from 2")
        if sum(self.rope_axes) != self.head_dim:
            raise ValueError(
                f"model.rope_axes={list(self.rope_axes)}: must add up to model.head_dim={self.head_dim}, "
                f"not {sum(self.rope_axes)}"
            )
        if self.embedded_guidance is not None and self.embedded_guidance < 0:
            raise ValueError(
                f"model.embedded_guidance={self.embedded_guidance:g}: must be at least 0, or null for none"
            )
        if self.image_channels and self.image_channels <= self.video_channels:
            raise ValueError(
                f"model.image_channels={self.image_channels}: must be 0, or more than "
                f"model.video_channels={self.video_channels}, for an image's latents and its mask"
            )
        if self.fusion not in get_args(Fusion):
            raise ValueError(f"model.fusion={self.fusion!r}: must be one of {', '.join(get_args(Fusion))}")


def waver_12b() -> TwinMMDiTConfig:
    """JoVA's larger size (24 B with both branches, sec. 4.4), on HunyuanVideo's blocks.

    Waver's second text encoder, and its learned positions beside the rotary ones, are left out.
    """
    return TwinMMDiTConfig()


def waver_1_6b() -> TwinMMDiTConfig:
    """JoVA's smaller size (3.2 B with both branches, sec. 4.4).

    Waver-1.6B's layout is not published. A guess: half the width of Waver-12B, and as many blocks as make 1.63 B
    a branch.
    """
    return TwinMMDiTConfig(num_layers=8, num_single_layers=24, num_heads=12)


def hunyuanvideo() -> TwinMMDiTConfig:
    """HunyuanVideo 1.0, whose weights are public, in Waver's place.

    Its guidance was distilled into it; 1 is a chosen scale to train at, that of data without guidance. The mask of a
    reference image has one channel, as in HunyuanVideo-I2V.
    """
    return TwinMMDiTConfig(num_layers=20, pooled_dim=768, embedded_guidance=1.0, image_channels=17)


@dataclass
class LTX2Config:
    """LTX-2's transformer for video and sound, and MMControl's bypass beside it. The defaults are the released 19B.

    "LTX-2" below is the config.json of the released LTX-2 19B transformer; "MMControl" the paper (arXiv 2604.19679).
    """

    # The backbone.
    num_layers: int = 48  # LTX-2
    num_heads: int = 32  # LTX-2, of both streams
    video_head_dim: int = 128  # LTX-2
    audio_head_dim: int = 64  # LTX-2; the streams attend to each other at this width
    video_channels: int = 128  # LTX-2, in and out: latents of its video codec
    audio_channels: int = 128  # LTX-2, in and out: latents of its audio codec, 8 channels of 16 bands
    text_dim: int = 3840  # LTX-2: Gemma's features after the connectors
    max_seconds: int = 20  # LTX-2: time that the rotary embedding spans
    max_pixels: int = 2048  # LTX-2: height and width that it spans

    # The bypass.
    bypass_every: int = 2  # MMControl, sec. 3.3: beside even layers

    @property
    def video_dim(self) -> int:
        """Width of the video stream."""
        return self.num_heads * self.video_head_dim

    @property
    def audio_dim(self) -> int:
        """Width of the audio stream."""
        return self.num_heads * self.audio_head_dim

    @property
    def bypass_layers(self) -> tuple[int, ...]:
        """Layers of the backbone that a bypass block stands beside."""
        return tuple(range(0, self.num_layers, self.bypass_every))

    def check(self) -> None:
        """Raise ValueError for values that no model can have; messages name the key as the command line does."""
        positive = (
            "num_layers", "num_heads", "video_head_dim", "audio_head_dim", "video_channels", "audio_channels",
            "text_dim", "max_seconds", "max_pixels", "bypass_every",
        )  # fmt: skip
        for key in positive:
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)}: must be at least 1")
        for key in ("video_head_dim", "audio_head_dim"):
            if getattr(self, key) % 2:
                raise ValueError(f"model.{key}={getattr(self, key)}: must be even for the rotary embedding")
        if self.video_dim < 6:
            raise ValueError(
                f"model.num_heads={self.num_heads} heads of model.video_head_dim={self.video_head_dim}: must be at "
                "least 6 wide together, for the rotary embedding's three axes"
            )
