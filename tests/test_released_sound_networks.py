"""Networks of sound as they are released: the published code's numbers for the same weights.

The numbers are those of panns-inference 0.1.1 with torchlibrosa 0.1.0, hear21passt 0.0.26 with torchaudio 2.11, and
UniSpeech's ECAPA-TDNN on Microsoft's WavLM.
"""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank

from avlit.errors import UserError
from avlit.metrics import aesthetics, cnn14, passt, registry, speaker
from avlit.metrics.clip import Clip, Sound
from avlit.metrics.cnn14 import Cnn14
from avlit.metrics.estimate import estimate
from avlit.metrics.metric import Tools
from avlit.metrics.passt import Passt, divergence, parts_of
from avlit.metrics.speaker import SpeakerNet, renamed
from tests.formula_weights import by_formula


def chirp(rate_hz: int, seconds: float, rise: float) -> np.ndarray:
    time = np.arange(round(rate_hz * seconds)) / rate_hz
    return (0.25 * np.sin(2 * np.pi * (200 + rise * time) * time)).astype(np.float32)


def sounding(waveform: np.ndarray, rate_hz: int = 16000, **other: Any) -> Clip:
    return Clip("a", 0.0, waveform=waveform, rate_hz=rate_hz, **other)


# FD


@pytest.fixture(scope="module")
def small_cnn14() -> Cnn14:
    """A narrow one, which hears as the released file says: a Hann window of 512, 64 of Slaney's bands."""
    network = by_formula(Cnn14(width=4))
    bins, time = np.arange(257)[:, None, None], np.arange(512)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * time / 512)
    front = {
        "spectrogram_extractor.stft.conv_real.weight": np.cos(2 * np.pi * bins * time / 512) * window,
        "spectrogram_extractor.stft.conv_imag.weight": -np.sin(2 * np.pi * bins * time / 512) * window,
        "logmel_extractor.melW": mel_filter_bank(257, 64, 50, 8000, 16000, norm="slaney", mel_scale="slaney"),
    }
    state = network.state_dict() | {name: torch.from_numpy(values).float() for name, values in front.items()}
    network.load_state_dict(state)
    return network


def test_cnn14_has_the_names_and_shapes_of_the_release() -> None:
    with torch.device("meta"):
        state = Cnn14().state_dict()
    assert len(state) == 84
    assert state["spectrogram_extractor.stft.conv_imag.weight"].shape == (257, 1, 512)
    assert state["logmel_extractor.melW"].shape == (257, 64) and state["bn0.running_mean"].shape == (64,)
    assert state["conv_block6.conv2.weight"].shape == (2048, 2048, 3, 3)
    assert state["fc1.weight"].shape == (2048, 2048) and state["fc_audioset.bias"].shape == (527,)


@torch.no_grad()
def test_cnn14_has_the_published_networks_features(small_cnn14: Cnn14) -> None:
    sound = np.round(8000 / 0.25 * chirp(16000, 1.0, 900)) / 32768
    features = small_cnn14(torch.from_numpy(sound - sound.mean()).float()[None])[0]
    assert features.shape == (128,) and int((features > 0).sum()) == 61
    known = [29.62071, 98.75601, 29.21746, 61.32896, 72.50242, 135.15518]
    np.testing.assert_allclose(features[[1, 3, 4, 6, 7, 14]], known, rtol=1e-3)


def test_fd_reads_the_released_file_and_is_no_distance_between_equal_sounds(
    small_cnn14: Cnn14, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "Cnn14_16k_mAP=0.438.pth"
    torch.save({"iteration": 1, "model": small_cnn14.state_dict()}, path)
    metric, tools = registry.metrics()["FD"], Tools(weights={"panns": path})
    with pytest.raises(UserError, match=r"weights.panns=.*: is not PANNs' CNN14 of 16 kHz .*size mismatch"):
        metric.meter.open(tools)
    monkeypatch.setattr(cnn14, "Cnn14", partial(Cnn14, width=4))
    measure = metric.meter.open(tools)
    sounds = [sounding(chirp(16000, 0.5, 300.0 * n)) for n in range(5)]
    same = [measure(replace(clip, real=replace(clip, waveform=clip.waveform + 0.1)))["FD"] for clip in sounds]  # type: ignore[operator]
    assert estimate(same, metric.summary).value == pytest.approx(0, abs=1e-3), "a constant is not heard"
    others = [measure(replace(clip, real=other))["FD"] for clip, other in zip(sounds, sounds[::-1], strict=True)]
    assert estimate(others, metric.summary).value == pytest.approx(0, abs=1e-3), "who is whose does not matter"
    noise = sounding(np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32))
    wrong = [measure(replace(clip, real=noise))["FD"] for clip in sounds]
    assert estimate(wrong, metric.summary).value > 10
    assert measure(replace(noise, waveform=np.zeros(5000, np.float32), real=noise)) == {}


# KL


def test_passt_has_the_names_and_shapes_of_the_release() -> None:
    with torch.device("meta"):
        network = Passt()
    state = network.state_dict()
    assert len(state) == 159
    assert state["patch_embed.proj.weight"].shape == (768, 1, 16, 16)
    assert state["time_new_pos_embed"].shape == (1, 768, 1, 99) and state["new_pos_embed"].shape == (1, 2, 768)
    assert state["freq_new_pos_embed"].shape == (1, 768, 12, 1) and state["dist_token"].shape == (1, 1, 768)
    assert state["blocks.11.attn.qkv.bias"].shape == (2304,) and state["blocks.0.mlp.fc1.weight"].shape == (3072, 768)
    assert state["head.0.weight"].shape == (768,) and state["head.1.weight"].shape == (527, 768)


@pytest.fixture(scope="module")
def small_passt() -> Passt:
    return by_formula(Passt(width=24, depth=2, heads=2))


@torch.no_grad()
def test_passt_has_the_published_networks_logits(small_passt: Passt) -> None:
    (logits,) = small_passt(torch.from_numpy(chirp(32000, 10.0, 300))[None])
    known = [-1.1631882, -0.2305394, 0.1675971, -0.3657364, -1.6467291, 0.6412868, 1.7973945]
    np.testing.assert_allclose(logits[[0, 1, 2, 3, -3, -2, -1]], known, atol=3e-5)


def test_long_sounds_are_heard_in_halves_of_ten_seconds() -> None:
    rate_hz = 32000
    short = parts_of(np.ones(4 * rate_hz, np.float32))
    assert short is not None and short.shape == (1, 10 * rate_hz) and short.sum() == 4 * rate_hz
    long = parts_of(np.arange(17 * rate_hz))
    assert long is not None and long[:, 0].tolist() == [0, 5 * rate_hz, 10 * rate_hz]
    assert np.count_nonzero(long[2]) == 7 * rate_hz
    assert parts_of(np.ones(rate_hz, np.float32)) is None


def test_kl_is_the_true_sounds_cross_entropy_less_its_entropy() -> None:
    generated, true = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, -1.0])
    p, q = ([math.exp(x) / sum(map(math.exp, row.tolist())) for x in row.tolist()] for row in (true, generated))
    assert divergence(generated, true) == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), 1e-4
    )
    assert divergence(true, generated) != pytest.approx(divergence(generated, true), rel=0.05)
    assert divergence(true, true) == pytest.approx(0, abs=1e-5)


def test_kl_reads_the_released_file_and_does_not_hear_loudness(
    small_passt: Passt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "passt.pt"
    torch.save(small_passt.state_dict(), path)
    meter, tools = registry.metrics()["KL"].meter, Tools(weights={"passt": path})
    with pytest.raises(UserError, match=r"weights.passt=.*: is not PaSST as it is released"):
        meter.open(tools)
    monkeypatch.setattr(passt, "Passt", partial(Passt, width=24, depth=2, heads=2))
    measure = meter.open(tools)
    clip = sounding(chirp(16000, 2.0, 200))
    found = measure(replace(clip, real=sounding(0.5 * chirp(16000, 2.0, 200))))
    assert found["KL"] == pytest.approx(0, abs=1e-3)
    noise = np.random.default_rng(0).normal(0, 0.1, 32000).astype(np.float32)
    assert measure(replace(clip, real=sounding(noise)))["KL"] > 0.01  # type: ignore[operator]
    assert measure(replace(clip, real=replace(clip, waveform=noise[:8000]))) == {}


# SIM-o

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module")
def small_speaker_net() -> SpeakerNet:
    return by_formula(SpeakerNet(speaker.WAVLM | SMALL, channels=16))


@torch.no_grad()
def test_the_speaker_net_has_the_published_networks_voice(small_speaker_net: SpeakerNet) -> None:
    (voice,) = small_speaker_net(torch.from_numpy(chirp(16000, 1.0, 900))[None])
    assert voice.shape == (256,)
    np.testing.assert_allclose(voice[:4], [98.92962, 58.27284, 13.30573, 155.12442], rtol=2e-4)


def as_released(name: str) -> str:
    """Our name of a tensor -> that of the released file."""
    if not name.startswith("feature_extract."):
        return name
    pairs = {
        "feature_extract.": "feature_extract.model.", "masked_spec_embed": "mask_emb",
        "feature_projection.projection": "post_extract_proj", "feature_projection.layer_norm": "layer_norm",
        "pos_conv_embed.conv.parametrizations.weight.original0": "pos_conv.0.weight_g",
        "pos_conv_embed.conv.parametrizations.weight.original1": "pos_conv.0.weight_v",
        "pos_conv_embed.conv.bias": "pos_conv.0.bias", ".attention.": ".self_attn.",
        "gru_rel_pos_const": "grep_a", "gru_rel_pos_linear": "grep_linear",
        "rel_attn_embed": "relative_attention_bias", "feed_forward.intermediate_dense": "fc1",
        "feed_forward.output_dense": "fc2",
    }  # fmt: skip
    if ".conv_layers." in name:
        pairs |= {".conv.weight": ".0.weight", ".layer_norm.": ".2.1."}
    if ".encoder.layers." in name:
        pairs[".layer_norm."] = ".self_attn_layer_norm."
    for ours, theirs in pairs.items():
        name = name.replace(ours, theirs)
    return name


def test_the_speaker_net_has_the_names_and_shapes_of_the_release() -> None:
    with torch.device("meta"):
        state = SpeakerNet().state_dict()
    released = {as_released(name): tensor.shape for name, tensor in state.items()}
    assert len(released) == 710 and [renamed(name) for name in released] == list(state)
    assert released["feature_extract.model.encoder.layers.0.self_attn.relative_attention_bias.weight"] == (320, 16)
    assert released["feature_extract.model.encoder.layers.23.self_attn_layer_norm.bias"] == (1024,)
    assert released["feature_extract.model.feature_extractor.conv_layers.6.2.1.weight"] == (512,)
    assert released["feature_extract.model.layer_norm.weight"] == (512,)
    assert released["feature_weight"] == (25,) and released["layer1.conv.weight"] == (512, 1024, 5)
    assert released["layer4.Res2Conv1dReluBn.convs.6.weight"] == (64, 64, 3)
    assert released["pooling.linear1.weight"] == (128, 1536, 1) and released["linear.weight"] == (256, 3072)


def test_sim_o_reads_the_released_file_and_knows_a_voice_again(
    small_speaker_net: SpeakerNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speaker, "SpeakerNet", partial(SpeakerNet, speaker.WAVLM | SMALL, channels=16))
    path = tmp_path / "wavlm_large_finetune.pth"
    state = {as_released(name): tensor for name, tensor in small_speaker_net.state_dict().items()}
    torch.save({"model": state | {"loss_calculator.projection.weight": torch.zeros(2)}}, path)
    meter, tools = registry.metrics()["SIM-o"].meter, Tools(weights={"speaker": path})
    measure, sound = meter.open(tools), chirp(16000, 1.0, 900)
    clip = sounding(sound, reference_voice=Sound(0.5 * sound, 16000))
    assert measure(clip)["SIM-o"] == pytest.approx(1, abs=1e-5), "loudness is not heard"
    noise = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    assert measure(replace(clip, waveform=noise))["SIM-o"] < 0.999  # type: ignore[operator]
    assert measure(replace(clip, waveform=sound[:700])) == {}
    del state["layer2.SE_Connect.linear1.bias"]
    torch.save({"model": state}, path)
    with pytest.raises(UserError, match=r"weights.speaker=.*: is not UniSpeech's verifier .*Missing key"):
        meter.open(tools)


# CE, CU, PC, PQ and UTMOS


def test_sounds_are_judged_in_parts_of_ten_seconds_and_silence_after_them_is_known() -> None:
    parts, is_sound = aesthetics.parts_of(np.ones(25 * 16000, np.float32))
    assert parts.shape == is_sound.shape == (3, 1, 160000)
    assert is_sound.sum((1, 2)).tolist() == [160000, 160000, 80000] and torch.equal(parts != 0, is_sound)
    assert aesthetics.parts_of(np.ones(160000, np.float32))[1].all()


def test_aesthetics_are_those_of_the_packages_own_predictor(tmp_path: Path) -> None:
    aes: Any = pytest.importorskip("audiobox_aesthetics.model.aes")
    torch.manual_seed(0)
    scale = {axis: {"mean": 5.0 + n, "std": 1.5} for n, axis in enumerate(aesthetics.AXES)}
    network = aes.AesMultiOutput(proj_num_layer=2, proj_ln=True, target_transform=scale).eval()
    network.save_pretrained(tmp_path)
    measure = registry.metrics()["CE"].meter.open(Tools(weights={"aesthetics": tmp_path}))
    sound = chirp(16000, 13.0, 90)
    found = measure(sounding(sound))
    with torch.no_grad():
        first = network({"wav": torch.from_numpy(sound[:160000])[None, None]})
        rest = torch.from_numpy(np.pad(sound[160000:], (0, 112000)))[None, None]
        last = network({"wav": rest, "mask": torch.arange(160000)[None, None] < 48000})
    for axis in aesthetics.AXES:
        known = (float(first[axis]) + 0.3 * float(last[axis])) / 1.3 * scale[axis]["std"] + scale[axis]["mean"]
        assert found[axis] == pytest.approx(known, abs=1e-4)


def test_a_folder_of_another_network_than_aesthetics_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("audiobox_aesthetics.model.aes")
    meter, tools = registry.metrics()["PQ"].meter, Tools(weights={"aesthetics": tmp_path})
    for config in ({}, {"target_transform": {"CE": {"mean": 1}}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"weights.aesthetics=.*: is not the folder of facebook/audiobox"):
            meter.open(tools)


def test_utmos_is_the_packages_own_score(tmp_path: Path) -> None:
    utmos: Any = pytest.importorskip("utmos_pytorch.utmos_torch")
    path = tmp_path / "utmos_state_dict.pt"
    torch.manual_seed(0)
    state = utmos.UTMOSModel().state_dict()
    torch.save(state, path)
    meter, tools = registry.metrics()["UTMOS"].meter, Tools(weights={"utmos": path})
    sound = chirp(16000, 1.0, 900)
    known = float(utmos.UTMOSScoreTorch(str(path)).score(torch.from_numpy(sound)))
    assert meter.open(tools)(sounding(sound))["UTMOS"] == pytest.approx(known, abs=1e-4)
    torch.save({name: state[name] for name in list(state)[1:]}, path)
    with pytest.raises(UserError, match=r"weights.utmos=.*: is not UTMOS22's strong learner .*Missing key"):
        meter.open(tools)
