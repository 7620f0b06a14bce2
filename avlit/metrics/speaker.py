"""SIM-o: how alike two voices are to WavLM-Large with ECAPA-TDNN on top, trained to tell speakers apart.

UniSpeech's verifier (Chen et al. 2022) as ZipVoice measures with it: the mean of WavLM's layers, of learned shares, is
read by ECAPA-TDNN (Desplanques et al. 2020). WavLM is that of transformers, under the names of the released file. Names
and numbers are from their source; the file itself was not at hand when this was written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import WavLMConfig, WavLMModel

from avlit.metrics.clip import Clip, Sound
from avlit.metrics.estimate import Reading
from avlit.metrics.metric import Measure, Meter, Metric, Tools, Weights
from avlit.metrics.speech import heard_at
from avlit.metrics.state_file import load_weights

SCALE, SQUEEZED, POOLED, VOICE = 8, 128, 1536, 256
LEAST = 720
"""Samples at 16 kHz that WavLM makes two steps of."""

WAVLM = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "do_stable_layer_norm": True, "feat_extract_norm": "layer", "num_buckets": 320, "max_bucket_distance": 800,
}  # fmt: skip

RENAMED = (
    (r"^mask_emb$", "masked_spec_embed"),
    (r"^post_extract_proj\.", "feature_projection.projection."),
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    (r"^(feature_extractor\.conv_layers\.\d+)\.0\.", r"\1.conv."),
    (r"^(feature_extractor\.conv_layers\.\d+)\.2\.1\.", r"\1.layer_norm."),
    (r"^encoder\.pos_conv\.0\.weight_g$", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"^encoder\.pos_conv\.0\.weight_v$", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"^encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
    (r"\.self_attn_layer_norm\.", ".layer_norm."),
    (r"\.self_attn\.", ".attention."),
    (r"\.grep_a$", ".gru_rel_pos_const"),
    (r"\.grep_linear\.", ".gru_rel_pos_linear."),
    (r"\.relative_attention_bias\.", ".rel_attn_embed."),
    (r"\.fc1\.", ".feed_forward.intermediate_dense."),
    (r"\.fc2\.", ".feed_forward.output_dense."),
)
"""What WavLM's own names become in transformers."""

PREFIX = "feature_extract."


def renamed(name: str) -> str:
    """A name of the released file -> ours."""
    if not name.startswith(f"{PREFIX}model."):
        return name
    name = name.removeprefix(f"{PREFIX}model.")
    for pattern, instead in RENAMED:
        name = re.sub(pattern, instead, name)
    return PREFIX + name


class Unit(nn.Module):
    """A convolution over time, what is positive of it, and its normalisation: [B, C, M] -> [B, C', M]."""

    def __init__(self, inside: int, outside: int, kernel: int = 1):
        super().__init__()
        self.conv = nn.Conv1d(inside, outside, kernel, padding=kernel // 2)
        self.bn = nn.BatchNorm1d(outside)

    def forward(self, heard: Tensor) -> Tensor:
        return self.bn(self.conv(heard).relu())


class Res2(nn.Module):
    """Eighths of the channels, each convolved with what came of the one before added; the last is left as it is."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        width = channels // SCALE
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for _ in range(SCALE - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(SCALE - 1))

    def forward(self, heard: Tensor) -> Tensor:
        *parts, last = heard.chunk(SCALE, 1)
        found: list[Tensor] = []
        for part, conv, norm in zip(parts, self.convs, self.bns, strict=True):
            found.append(norm(conv(part + found[-1] if found else part).relu()))
        return torch.cat((*found, last), 1)


class Gate(nn.Module):
    """Each channel times what all channels' means over time make of it."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(channels, SQUEEZED), nn.Linear(SQUEEZED, channels)

    def forward(self, heard: Tensor) -> Tensor:
        return heard * self.linear2(self.linear1(heard.mean(2)).relu()).sigmoid()[:, :, None]


class Block(nn.Module):
    """[B, C, M] -> the same and what it has found in steps that lie `dilation` apart."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.Conv1dReluBn1, self.Conv1dReluBn2 = Unit(channels, channels), Unit(channels, channels)
        self.Res2Conv1dReluBn, self.SE_Connect = Res2(channels, dilation), Gate(channels)

    def forward(self, heard: Tensor) -> Tensor:
        return heard + self.SE_Connect(self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(heard))))


class Pool(nn.Module):
    """[B, C, M] -> mean and spread over time by attention, [B, 2 C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Conv1d(channels, SQUEEZED, 1), nn.Conv1d(SQUEEZED, channels, 1)

    def forward(self, heard: Tensor) -> Tensor:
        share = self.linear2(self.linear1(heard).tanh()).softmax(2)
        mean = (share * heard).sum(2)
        spread = ((share * heard.square()).sum(2) - mean.square()).clamp(min=1e-9).sqrt()
        return torch.cat((mean, spread), 1)


class SpeakerNet(nn.Module):
    """A sound [1, N] at 16 kHz -> its voice, [1, 256]. wavlm: keys of transformers' WavLMConfig."""

    def __init__(self, wavlm: Mapping[str, object] = WAVLM, *, channels: int = 512) -> None:
        super().__init__()
        config = WavLMConfig(**wavlm)  # type: ignore[arg-type]
        self.feature_extract = WavLMModel(config)
        self.feature_weight = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.layer1 = Unit(config.hidden_size, channels, 5)
        self.layer2, self.layer3, self.layer4 = (Block(channels, dilation) for dilation in (2, 3, 4))
        self.conv = nn.Conv1d(3 * channels, POOLED, 1)
        self.pooling, self.bn, self.linear = Pool(POOLED), nn.BatchNorm1d(2 * POOLED), nn.Linear(2 * POOLED, VOICE)

    def forward(self, sound: Tensor) -> Tensor:
        sound = F.layer_norm(sound, sound.shape[1:])
        found = self.feature_extract(sound, output_hidden_states=True)
        # What each layer is given, and what is normalised after the last, which transformers does not list.
        layers = torch.stack((*found.hidden_states[:-1], found.last_hidden_state))  # [L, 1, M, D]
        heard = (self.feature_weight.softmax(0).view(-1, 1, 1, 1) * layers).sum(0).transpose(1, 2)  # [1, D, M]
        heard = self.layer1(F.instance_norm(heard + 1e-6))
        second = self.layer2(heard)
        third = self.layer3(second)
        heard = self.conv(torch.cat((second, third, self.layer4(third)), 1)).relu()
        return self.linear(self.bn(self.pooling(heard)))


def _open(tools: Tools) -> Measure:
    network = load_weights(SpeakerNet(), VERIFIER, tools, inside="model", has_others=True, named=renamed)

    def voice(sound: Sound) -> Tensor | None:
        heard = heard_at(sound)
        return None if len(heard) < LEAST else network(torch.from_numpy(heard)[None].to(tools.device))[0]

    @torch.no_grad()
    def measure(clip: Clip) -> Mapping[str, Reading]:
        assert clip.own_sound is not None and clip.reference_voice is not None
        own, reference = voice(clip.own_sound), voice(clip.reference_voice)
        return {} if own is None or reference is None else {"SIM-o": float(F.cosine_similarity(own, reference, dim=0))}

    return measure


VERIFIER = Weights("speaker", "UniSpeech's verifier of WavLM-Large and ECAPA-TDNN (wavlm_large_finetune.pth)")

METRICS = (
    Metric(
        "SIM-o", "cosine of the voice and the reference voice, by WavLM-Large with ECAPA-TDNN", "higher", -1, 1, "",
        "MMControl, Appendix B; as ZipVoice's evaluation",
        Meter("speaker", _open, ("own_sound", "reference_voice"), (VERIFIER,)),
    ),
)  # fmt: skip
