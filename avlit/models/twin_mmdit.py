"""Twin MM-DiTs for video and sound, joined by the attention of every block (JoVA, sec. 3.2), on HunyuanVideo's blocks.

Each branch is the stock diffusers model with its own text, run submodule by submodule; dual-stream blocks come first,
then single-stream ones. N video tokens, L audio tokens, one a latent; S tokens of a branch's text.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from avlit.models.aligned_rope import aligned_rotary
from avlit.models.backbones import LayerRun, Rotary, Stock, run_layer
from avlit.models.joint_attention import Mode
from avlit.models.mmdit_block import Branch, Meeting, dual_block, single_block
from avlit.models.mmdit_branch import BranchText, build_adapters, build_branch, build_ends, enter_branch, seeded
from avlit.models.pretrained import WeightsReport, fill_tensor, load_backbone
from avlit.models.sizes import TwinMMDiTConfig
from avlit.models.twin_block import Observe
from avlit.models.twin_wan import Velocities

ENDS = ("x_embedder.", "proj_out.")
"""What the audio branch does not share with the video branch: projections of its latents in and out (JoVA, 3.2.1)."""


class TwinMMDiT(nn.Module):
    """Noisy video and audio latents, each with its text, to the flow's velocities (JoVA, sec. 3.2).

    backbone: the video branch, the stock diffusers model, its keys under `backbone.`; audio: the same model for audio
    latents, which have one place a frame; video_adapters, audio_adapters: the linear layers of fusion "cross_linear".
    In mode "separate" both velocities are the stock model's, bit for bit.
    layer_run: how each block is run.
    """

    backbone: Stock
    audio: Stock

    def __init__(self, config: TwinMMDiTConfig, *, seed: int = 0, draws_video: bool = True) -> None:
        """Weights drawn from `seed`, whatever ran before. Under `torch.device("meta")` nothing is drawn.

        draws_video: False leaves on the meta device what `load_released` fills: both branches but for audio's ends.
        """
        super().__init__()
        config.check()
        self.config = config
        video_channels = config.video_channels
        place = nullcontext() if draws_video else torch.device("meta")
        with seeded(seed, "video branch"), place:
            self.backbone = build_branch(
                config, video_channels + config.image_channels, video_channels, config.patch_size
            )
        with seeded(seed, "audio branch"), place:
            self.audio = build_branch(config, config.audio_channels, config.audio_channels, 1)
        self.draw_new(seed=seed)
        self.layer_run = LayerRun()
        self.rotary_of_shape: dict[tuple[float | torch.device, ...], Rotary] = {}

    def draw_new(self, *, seed: int = 0) -> None:
        """New weights, a function of `seed` alone, for what no released video model has: audio's ends and adapters.

        Call it between building a model on the meta device and `load_released`.
        """
        with seeded(seed, "audio ends"):
            self.audio.x_embedder, self.audio.proj_out = build_ends(self.config, self.config.audio_channels)
            self.video_adapters, self.audio_adapters = build_adapters(self.config), build_adapters(self.config)

    @property
    def units(self) -> list[nn.Module]:
        """What is sharded as one: blocks that few parameters lie between."""
        units: list[nn.Module] = []
        for twin in (self.backbone, self.audio):
            refiner = twin.context_embedder.token_refiner.refiner_blocks
            units += [*twin.transformer_blocks, *twin.single_transformer_blocks, *refiner]
        return units + [adapter for each in (self.video_adapters, self.audio_adapters) for adapter in each or ()]

    @property
    def num_joint_layers(self) -> int:
        """Blocks in which video and sound meet."""
        return self.config.num_layers + self.config.num_single_layers

    def forward(
        self,
        video_latents: Tensor | None,
        audio_latents: Tensor | None,
        *,
        video_text: BranchText | None = None,
        audio_text: BranchText | None = None,
        video_timestep: Tensor | None = None,
        audio_timestep: Tensor | None = None,
        image: Tensor | None = None,
        has_image: Tensor | None = None,
        mode: Mode = "joint",
        num_frames: float | None = None,
        observe: Observe | None = None,
    ) -> Velocities:
        """Velocities of latents video [B, C, T, h, w] and audio [B, L, C]; one of the two may be None.

        A branch without latents has no text and no timestep, costs nothing and gets no gradient. *_timestep [B], from 0
        (clean) to 1000. image [B, C, 1, h, w]: latents of a reference image, beside the first latent frame with a mask
        of ones, zeros elsewhere (chosen, as HunyuanVideo-I2V); has_image [B] bool: clips that are given it, None is
        all. mode: see `joint_attention`; one-way is video blind to sound. num_frames: latent frames that video of the
        same duration as sound without video would have, not necessarily whole; unused where `aligned_rope` is off.
        observe is told, of every block, what video, audio, video text and audio text bring, as far as they are there.
        ValueError for inputs that do not fit together.
        """
        self._check(video_latents, audio_latents, video_text, audio_text, video_timestep, audio_timestep)
        self._check_modes(video_latents, audio_latents, mode, num_frames)
        self._check_image(video_latents, image, has_image)
        config, scale = self.config, self.config.embedded_guidance
        branches: list[Branch] = []
        tokens: tuple[Tensor, ...] = ()
        if video_latents is not None and video_text is not None and video_timestep is not None:
            num_frames, height, width = video_latents.shape[2:]
            rotary = self._video_rotary(num_frames, height, width, video_latents.device)
            latents = self._with_image(video_latents, image, has_image)
            branch, *found = enter_branch(self.backbone, latents, video_text, video_timestep, rotary, scale)
            branches.append(branch)
            tokens += tuple(found)
        if audio_latents is not None and audio_text is not None and audio_timestep is not None:
            num_tokens = audio_latents.shape[1]
            spanned = num_frames if config.aligned_rope and num_frames is not None else num_tokens
            rotary = self._audio_rotary(num_tokens, spanned, audio_latents.device)
            latents = audio_latents.transpose(1, 2)[..., None, None]  # [B, C, L, 1, 1]
            branch, *found = enter_branch(self.audio, latents, audio_text, audio_timestep, rotary, scale)
            branches.append(branch)
            tokens += tuple(found)

        run = self.layer_run
        for layer in range(config.num_layers):
            blocks = [branch.twin.transformer_blocks[layer] for branch in branches]
            meeting = self._meeting(layer, len(branches), mode, observe)
            tokens = run_layer(
                dual_block, blocks, branches, meeting, *tokens, run=run, units=(*blocks, *meeting.adapters)
            )
        tokens = tuple(torch.cat(pair, dim=1) for pair in zip(tokens[::2], tokens[1::2], strict=True))
        for layer in range(config.num_layers, config.num_layers + config.num_single_layers):
            blocks = [branch.twin.single_transformer_blocks[layer - config.num_layers] for branch in branches]
            meeting = self._meeting(layer, len(branches), mode, observe)
            tokens = run_layer(
                single_block, blocks, branches, meeting, *tokens, run=run, units=(*blocks, *meeting.adapters)
            )

        outputs = [
            branch.twin.proj_out(branch.twin.norm_out(x[:, : branch.num_tokens], branch.temb))
            for branch, x in zip(branches, tokens, strict=True)
        ]
        audio = outputs[-1] if audio_latents is not None else None  # [B, L, C]
        video = self._to_latents(outputs[0], video_latents) if video_latents is not None else None
        return Velocities(video=video, audio=audio)

    def _meeting(self, layer: int, num_branches: int, mode: Mode, observe: Observe | None) -> Meeting:
        """layer: counted from the first dual block."""
        adapters = ()
        if num_branches == 2 and self.video_adapters is not None and self.audio_adapters is not None:
            adapters = (self.video_adapters[layer], self.audio_adapters[layer])
        watch = None if observe is None else partial(observe, layer)
        return Meeting(self.config.fusion, mode, watch, adapters)

    def _with_image(self, latents: Tensor, image: Tensor | None, has_image: Tensor | None) -> Tensor:
        """[B, C, T, h, w] -> [B, C + image_channels, T, h, w]: latents, then those of the image, then its mask."""
        batch, channels, frames, height, width = latents.shape
        condition = latents.new_zeros(batch, self.config.image_channels, frames, height, width)
        if image is not None:
            given = image.new_ones(batch, dtype=torch.bool) if has_image is None else has_image
            given = given[:, None, None, None]
            condition[:, :channels, 0] = torch.where(given, image[:, :, 0].to(latents.dtype), 0)
            condition[:, channels:, 0] = given.to(latents.dtype)
        return torch.cat((latents, condition), dim=1)

    def _to_latents(self, output: Tensor, like: Tensor) -> Tensor:
        """[B, N, C * p * p] -> [B, C, T, h, w], the shape of `like`."""
        batch, channels, frames, height, width = like.shape
        patch = self.config.patch_size
        output = output.reshape(batch, frames, height // patch, width // patch, channels, patch, patch)
        return output.permute(0, 4, 1, 2, 5, 3, 6).reshape(like.shape)

    def _video_rotary(self, frames: int, height: int, width: int, device: torch.device) -> Rotary:
        """[N, head] twice, the stock model's positions."""
        key = (frames, height, width, device)
        if key not in self.rotary_of_shape:
            # A validation may come first: tensors made in inference mode could not enter a training graph later.
            with torch.inference_mode(False):
                self.rotary_of_shape[key] = self.backbone.rope(torch.empty(1, 1, frames, height, width, device=device))
        return self.rotary_of_shape[key]

    def _audio_rotary(self, num_tokens: int, num_frames: float, device: torch.device) -> Rotary:
        """[L, head] twice, audio token l at l * num_frames / L of the time axis."""
        key = (num_tokens, num_frames, device)
        if key not in self.rotary_of_shape:
            config = self.config
            with torch.inference_mode(False):
                self.rotary_of_shape[key] = aligned_rotary(
                    num_tokens, num_frames=num_frames, axes=config.rope_axes, theta=config.rope_theta, device=device
                )
        return self.rotary_of_shape[key]

    def _check(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        video_text: BranchText | None,
        audio_text: BranchText | None,
        video_timestep: Tensor | None,
        audio_timestep: Tensor | None,
    ) -> None:
        config = self.config
        if video is None and audio is None:
            raise ValueError("neither video_latents nor audio_latents: give at least one")
        for name, latents, text, timestep in (
            ("video", video, video_text, video_timestep),
            ("audio", audio, audio_text, audio_timestep),
        ):
            if (latents is None) != (timestep is None) or (latents is None) != (text is None):
                raise ValueError(f"{name}_latents, {name}_text and {name}_timestep go together: give all or none")
            if latents is None or text is None or timestep is None:
                continue
            if timestep.shape != latents.shape[:1]:
                raise ValueError(
                    f"{name}_timestep has shape {tuple(timestep.shape)}: must be [B], here [{len(latents)}]"
                )
            _check_text(name, text, len(latents), config)
        if video is not None:
            _, channels, _, height, width = video.shape
            if channels != config.video_channels:
                raise ValueError(
                    f"video latents have {channels} channels but model.video_channels={config.video_channels}: "
                    "set it to the video codec's channels"
                )
            if height % config.patch_size or width % config.patch_size:
                raise ValueError(
                    f"video latents of {height}x{width}: must be multiples of model.patch_size={config.patch_size}"
                )
        if audio is not None and audio.shape[-1] != config.audio_channels:
            raise ValueError(
                f"audio latents have {audio.shape[-1]} channels but model.audio_channels={config.audio_channels}: "
                "set it to the audio codec's channels"
            )

    def _check_modes(self, video: Tensor | None, audio: Tensor | None, mode: Mode, num_frames: float | None) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r}: must be one of {', '.join(get_args(Mode))}")
        if (video is None or audio is None) and mode != "joint":
            raise ValueError(f"mode={mode!r}: a single branch has nothing to be told apart from; leave mode at 'joint'")
        if (num_frames is None) == (video is None):
            raise ValueError(
                f"num_frames={num_frames}: give it for sound without video, and only then; "
                "with video it is the latents' own"
            )

    def _check_image(self, video: Tensor | None, image: Tensor | None, has_image: Tensor | None) -> None:
        if image is None:
            if has_image is not None:
                raise ValueError("has_image without image: give the image's latents too")
            return
        if video is None:
            raise ValueError("image without video_latents: only video is given an image")
        if not self.config.image_channels:
            raise ValueError("an image is given but model.image_channels=0: set it to the image's and mask's channels")
        expected = (*video.shape[:2], 1, *video.shape[3:])
        if tuple(image.shape) != expected:
            raise ValueError(f"image has shape {tuple(image.shape)}: must be {expected}, one latent frame of the video")


def _check_text(name: str, text: BranchText, batch: int, config: TwinMMDiTConfig) -> None:
    if text.features.ndim != 3 or text.features.shape[0] != batch or text.features.shape[2] != config.text_dim:
        raise ValueError(
            f"{name}_text has shape {tuple(text.features.shape)}: must be [B, S, model.text_dim], "
            f"here [{batch}, S, {config.text_dim}]"
        )
    longest = text.features.shape[1]
    if text.lengths is not None and (
        len(text.lengths) != batch or not all(1 <= length <= longest for length in text.lengths)
    ):
        raise ValueError(
            f"{name}_text has lengths {list(text.lengths)}: must be {batch} of 1 to {longest}; "
            "a clip without text has one token of zeros"
        )
    if (text.pooled is None) != (config.pooled_dim is None):
        raise ValueError(
            f"{name}_text has {'no ' if text.pooled is None else ''}pooled features but "
            f"model.pooled_dim={config.pooled_dim}: they go together"
        )


def mmdit_trainable(model: TwinMMDiT, *, which: Literal["video", "audio", "all"]) -> list[str]:
    """Names of the parameters that train: a branch alone, as in JoVA's first stage, or everything (chosen)."""
    names = [name for name, _ in model.named_parameters()]
    prefixes = {"video": "backbone.", "audio": "audio.", "all": ""}
    if which not in prefixes:
        raise ValueError(f"trainable={which!r}: must be one of {', '.join(prefixes)}")
    return [name for name in names if name.startswith(prefixes[which])]


def duplicate_video(model: TwinMMDiT) -> tuple[str, ...]:
    """Copy the video branch into the audio branch, but for the ends (JoVA, 3.2.1); returns the names that were filled.

    An audio branch on the meta device takes copies in the video branch's precision.
    """
    source = model.backbone.state_dict()
    names = sorted(name for name in model.audio.state_dict() if not name.startswith(ENDS))
    for name in names:
        fill_tensor(model.audio, name, source[name])
    return tuple(f"audio.{name}" for name in names)


def load_released(model: TwinMMDiT, folder: str | Path) -> WeightsReport:
    """Fill the video branch from a released HunyuanVideo folder of its size, and the audio branch with copies of it.

    Input channels for a reference image that the folder lacks start at zero. Checks and errors are those of
    `load_backbone`; nothing changes if there is one. In the report, the copies are among the loaded tensors. ValueError
    also for audio's ends on the meta device, which no folder fills.
    """
    if model.audio.proj_out.weight.is_meta:
        raise ValueError("the audio branch's ends are on the meta device and no folder has them: call draw_new first")
    report = load_backbone(model, folder, widened={"x_embedder.proj.weight": model.config.video_channels})
    copied = duplicate_video(model)
    new = tuple(name for name in report.new if name not in copied)
    return replace(report, loaded=report.loaded + copied, new=new)
