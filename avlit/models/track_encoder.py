"""Demixed tracks to interval tokens: MTV's track encoders and interval interaction blocks (MTV, sec. 4.2).

Letters beyond avlit.batch: M tokens of one track and interval; E width of those tokens; S space tokens of a frame.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avlit.models.sizes import MSTControlNetConfig


@dataclass(frozen=True)
class ControlTokens:
    """What the audio says to every layer.

    interval: tokens [B*T, M, E] of each cross-attention, by its name. style [B, E]: the clip's music, None where an
    ablation has no holistic stream.
    """

    interval: dict[str, Tensor]
    style: Tensor | None


class IntervalEncoder(nn.Module):
    """Features of one track at the video's frame rate to M tokens for each latent frame.

    A frame reads the frames up to `audio_window` before and after it, at a clip's ends the end frame again. Then the
    frame count is reduced as the causal video codec reduces it: the first frame alone, then {1..4}, {5..8}, ...
    """

    def __init__(self, config: MSTControlNetConfig) -> None:
        super().__init__()
        self.window, self.tokens = config.audio_window, config.audio_tokens
        seen = (2 * config.audio_window + 1) * config.audio_layers * config.audio_dim
        channels = config.audio_tokens * config.control_dim
        self.proj1 = nn.Linear(seen, config.audio_hidden)
        self.proj2 = nn.Linear(config.audio_hidden, config.audio_hidden)
        self.proj3 = nn.Linear(config.audio_hidden, channels)
        # One module for both halvings, as in the published code.
        self.halve = nn.Conv1d(channels, channels, kernel_size=2, stride=2, groups=config.conv_groups)
        self.norm = nn.LayerNorm(config.control_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[B, F, K, D] with F = 4n + 1 -> [B, T, M, E] with T = n + 1. ValueError for any other F."""
        frames = features.shape[1]
        if frames % 4 != 1:
            raise ValueError(f"track features have {frames} frames: must be 4n + 1, one for each frame of the video")
        near = torch.arange(-self.window, self.window + 1, device=features.device)
        index = (torch.arange(frames, device=features.device)[:, None] + near).clamp(0, frames - 1)  # [F, window]
        x = features[:, index].flatten(2)  # [B, F, window * K * D]
        x = self.proj3(F.relu(self.proj2(F.relu(self.proj1(x)))))  # [B, F, M * E]
        if frames > 1:
            x = x.transpose(1, 2)  # [B, M * E, F]
            for _ in range(2):
                x = torch.cat((x[..., :1], self.halve(x[..., 1:])), dim=-1)
            x = x.transpose(1, 2)  # [B, T, M * E]
        return self.norm(x.unflatten(-1, (self.tokens, -1)))


class InteractionBlock(nn.Module):
    """One interval interaction block: tracks are refined apart and meet in a self-attention over their interval."""

    def __init__(self, config: MSTControlNetConfig) -> None:
        super().__init__()
        width = config.control_dim
        # The second speaker is the same kind of track as the first: one norm and one modulation for both.
        kinds = [track for track in config.interval_tracks if track != "speech_second"]
        self.heads = config.interaction_heads
        self.modulation = nn.ModuleDict({kind: nn.Linear(config.temb_dim, 6 * width) for kind in kinds})
        self.norm = nn.ModuleDict({kind: nn.LayerNorm(width) for kind in kinds})
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.post_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, tracks: dict[str, Tensor], temb: Tensor) -> dict[str, Tensor]:
        """Tracks [B, T, M, E] by name, temb [B, D] -> the same tracks.

        The published code modulates the whole batch with its first sample's time; here each sample has its own.
        """
        names = list(tracks)
        kinds = ["speech" if name == "speech_second" else name for name in names]
        temb = F.silu(temb)
        modulation = {kind: layer(temb)[:, None, None].chunk(6, -1) for kind, layer in self.modulation.items()}
        sizes = [tracks[name].shape[2] for name in names]

        x = [
            self.norm[kind](tracks[name]) * (1 + modulation[kind][1]) + modulation[kind][0]
            for name, kind in zip(names, kinds, strict=True)
        ]
        attended = self.attend(torch.cat(x, dim=2)).split(sizes, dim=2)
        x = [tracks[name] + modulation[kind][2] * out for name, kind, out in zip(names, kinds, attended, strict=True)]
        inner = [
            self.post_norm(track) * (1 + modulation[kind][4]) + modulation[kind][3]
            for track, kind in zip(x, kinds, strict=True)
        ]
        refined = self.mlp(torch.cat(inner, dim=2)).split(sizes, dim=2)
        return {
            name: track + modulation[kind][5] * out
            for name, kind, track, out in zip(names, kinds, x, refined, strict=True)
        }

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over all tokens of one interval: [B, T, M, E] -> [B, T, M, E]."""
        batch = x.shape[:2]
        qkv = self.to_qkv(x).flatten(0, 1).unflatten(-1, (3, self.heads, -1))  # [B*T, M, 3, H, E/H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B*T, H, M, E/H]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2)).unflatten(0, batch)


class MultiStreamControl(nn.Module):
    """All tracks to the tokens that the layers read: the interval stream and the holistic stream."""

    def __init__(self, config: MSTControlNetConfig) -> None:
        super().__init__()
        self.interval_tracks = config.interval_tracks
        self.has_style, self.separate_injection = config.has_style, config.separate_injection
        self.encoders = nn.ModuleDict({track: IntervalEncoder(config) for track in ("speech", "effects", "music")})
        self.blocks = nn.ModuleList(InteractionBlock(config) for _ in range(config.num_interaction_blocks))
        self.speaker_embedding = nn.Parameter(torch.zeros(2, config.control_dim)) if config.second_speaker else None

    def forward(
        self, speech: Tensor, effects: Tensor, music: Tensor, *, speech_second: Tensor | None, temb: Tensor
    ) -> ControlTokens:
        """Track features [B, F, K, D] and the time embedding [B, D] -> ControlTokens.

        speech_second None reads as a silent second speaker (zero features) where the model has one.
        """
        music_tokens = self.encoders["music"](music)  # [B, T, M, E]
        tracks = {"speech": self.encoders["speech"](speech)}
        if self.speaker_embedding is not None:
            second = torch.zeros_like(speech) if speech_second is None else speech_second
            tracks["speech"] = tracks["speech"] + self.speaker_embedding[0]
            tracks["speech_second"] = self.encoders["speech"](second) + self.speaker_embedding[1]
        tracks["effects"] = self.encoders["effects"](effects)
        if "music" in self.interval_tracks:
            tracks["music"] = music_tokens
        for block in self.blocks:
            tracks = block(tracks, temb)

        if self.has_style:
            style = music_tokens.mean(dim=(1, 2))  # [B, E]
            return ControlTokens({name: track.flatten(0, 1) for name, track in tracks.items()}, style)
        if self.separate_injection:
            return ControlTokens({name: track.flatten(0, 1) for name, track in tracks.items()}, None)
        tracks.setdefault("music", music_tokens)
        return ControlTokens({"merged": torch.cat(list(tracks.values()), dim=2).flatten(0, 1)}, None)
