"""Metrics of real clips, by optional packages and by released formats with tiny random weights; absent ones say why."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter

from avlit.errors import UserError
from avlit.metrics import embeddings, moving_picture, registry, speech
from avlit.metrics.clip import Clip, Sound
from avlit.metrics.metric import Absent, Tools, Weights
from tests.conftest import save_tokenizer

RATE_HZ = 16000


def moving(step: int, count: int = 12, size: int = 64) -> np.ndarray:
    """A pattern that moves by `step` pixels a frame: uint8 [F, H, W, 3]."""
    picture = gaussian_filter(np.random.default_rng(0).uniform(0, 255, (size, size)), 3)
    picture = 255 * (picture - picture.min()) / (picture.max() - picture.min())
    frames = np.stack([np.roll(picture, step * n, axis=1) for n in range(count)])
    return np.repeat(frames[..., None], 3, axis=-1).astype(np.uint8)


def tone(seconds: float = 2.0, hertz: float = 1000.0, level: float = 0.1) -> np.ndarray:
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return (level * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def readings(name: str, clip: Clip, /, **weights: Path) -> dict[str, Any]:
    meter = registry.metrics()[name].meter
    tools = Tools(weights=weights)
    if packages := [lack for lack in meter.lacks(tools) if lack.startswith("the package")]:
        pytest.skip(packages[0])
    assert not meter.lacks(tools) and meter.applies(clip)
    return dict(meter.open(tools)(clip))


def test_words_are_compared_as_whispers_normaliser_writes_them(tmp_path: Path):
    assert speech.word_errors("Hello, MOON!", "hello moon", {}) == (0, 2)
    assert speech.word_errors("a sea", "the deep sea", {}) == (pytest.approx(2), 3)
    assert speech.word_errors("It's twenty one.", "um, it is 21", {}) == (0, 3)
    assert speech.word_errors("I can't", "I can", {}) == (pytest.approx(1), 2), "can not is two words"
    assert speech.word_errors("moon", "hmm", {}) == (1, 0), "fillers are no words"
    assert speech.word_errors("the colour", "the color", {})[0] == pytest.approx(1)
    path = tmp_path / "normalizer.json"
    assert speech.read_spelling(path) == {}
    path.write_text('{"colour": "color"}')
    assert speech.word_errors("the colour", "the color", speech.read_spelling(path)) == (0, 2)
    for broken in ("no json", '["colour"]'):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"weights.whisper: .*normalizer.json"):
            speech.read_spelling(path)


def test_mouths_that_follow_the_sound_are_told_from_those_that_do_not_and_their_lag_is_found():
    level = np.clip(gaussian_filter(np.random.default_rng(2).standard_normal(60), 1.5) * 2, -1, 1)
    sound = np.repeat(10 ** (level - 1.5), 800) * np.sin(np.arange(60 * 800) * 0.3)
    own = moving_picture.lip_motion(level, sound.astype(np.float32))
    late = moving_picture.lip_motion(np.roll(level, 4), sound.astype(np.float32))
    other = moving_picture.lip_motion(
        gaussian_filter(np.random.default_rng(3).standard_normal(60), 1.5), sound.astype(np.float32)
    )
    assert own is not None and late is not None and other is not None
    assert own[0] == 0 and own[1] > 0.95
    assert late[0] == 4 and late[1] > 0.9
    assert other[1] < 0.7
    gaps = level.copy()
    gaps[::3] = np.nan
    found = moving_picture.lip_motion(gaps, sound.astype(np.float32))
    assert found is not None and found[1] > 0.8
    assert moving_picture.lip_motion(np.full(60, np.nan), sound.astype(np.float32)) is None


def test_the_voice_encoder_reads_resemblyzers_file_and_knows_a_voice_again(tmp_path: Path):
    torch.manual_seed(0)
    encoder = speech.VoiceEncoder()
    state = {**encoder.state_dict(), "similarity_weight": torch.ones(1)}
    torch.save({"model_state": state}, tmp_path / "pretrained.pt")
    read = speech.VoiceEncoder.load(tmp_path / "pretrained.pt")
    voice = read.voice(tone(3.0))
    assert np.linalg.norm(voice) == pytest.approx(1, abs=1e-5)
    assert read.voice(tone(3.0)) @ voice == pytest.approx(1, abs=1e-5)
    assert read.voice(tone(0.2)).shape == (256,), "shorter than a part"
    assert read.voice(np.zeros(RATE_HZ, np.float32)).shape == (256,)


def test_loudness_of_a_full_scale_sine_is_the_standards():
    clip = Clip("a", 0.0, waveform=np.sin(2 * np.pi * 997 * np.arange(4 * 48000) / 48000), rate_hz=48000)
    assert readings("loudness", clip)["loudness"] == pytest.approx(-3.01, abs=0.1)


def test_flow_is_the_speed_of_what_moves_and_steady_motion_does_not_jerk():
    steady = readings("flow_motion", Clip("a", 12.0, frames=moving(2)))
    assert steady["flow_motion"] == pytest.approx(2, rel=0.2)
    still = readings("flow_motion", Clip("a", 12.0, frames=moving(0)))
    assert still == {"flow_motion": pytest.approx(0, abs=1e-3)}
    frames = moving(1, 13)
    shaking = Clip("a", 12.0, frames=frames[[0, 2, 0, 2, 0, 2, 0, 2]])
    assert readings("flow_jerk", shaking)["flow_jerk"] > 3 * steady["flow_jerk"]


def test_a_cut_is_found_where_there_is_one():
    frames = moving(1, 40)
    cut = np.concatenate((frames[:20], 255 - frames[:20] // 3))
    assert readings("shot_cuts", Clip("a", 12.0, frames=cut))["shot_cuts"] == 1
    assert readings("shot_cuts", Clip("a", 12.0, frames=frames))["shot_cuts"] == 0


def test_silence_is_no_speech():
    silent = Clip("a", 0.0, waveform=np.zeros(RATE_HZ, np.float32), rate_hz=RATE_HZ)
    assert readings("speech_share", silent)["speech_share"] == 0


def test_opinion_scores_are_on_their_scale_and_do_not_depend_on_the_rate():
    pytest.importorskip("xls_r_sqa")
    sound = speech.heard_at(Sound(tone(hertz=220.0), RATE_HZ), 48000)
    given = Clip("a", 0.0, waveform=tone(hertz=220.0), rate_hz=RATE_HZ)
    score = readings("DistillMOS", given)["DistillMOS"]
    assert 1 <= score <= 5
    other = readings("DistillMOS", replace(given, waveform=sound, rate_hz=48000))["DistillMOS"]
    assert other == pytest.approx(score, abs=0.2)


def test_nothing_that_is_said_is_every_word_wrong():
    silent = Clip("a", 0.0, waveform=np.zeros(RATE_HZ, np.float32), rate_hz=RATE_HZ, transcript="hello moon")
    errors, count = readings("WER-tiny.en", silent)["WER-tiny.en"]
    assert count == 2 and errors >= 1


def save_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    part: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    config = CLIPConfig(
        text_config={**part, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 1},
        vision_config={**part, "image_size": 32, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_clip_reads_a_released_folder_and_still_frames_are_consistent(tmp_path: Path):
    save_clip(tmp_path)
    clip = Clip("a", 12.0, frames=moving(0, 4), prompt="[VISUAL]: a b [SPEECH]: c")
    found = readings("Temp-C", clip, clip=tmp_path)
    assert found["Temp-C"] == pytest.approx(100, abs=1e-3)
    assert -1 <= found["Text CLIP Similarity"] <= 1
    noisy = replace(clip, frames=np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8))
    assert readings("Temp-C", noisy, clip=tmp_path)["Temp-C"] < found["Temp-C"]
    head = {"weight": torch.zeros(1, 8), "bias": torch.tensor([5.5])}
    torch.save(head, tmp_path / "head.pth")
    weights = {"clip": tmp_path, "aesthetic_head": tmp_path / "head.pth"}
    assert readings("Aesthetic Quality", clip, **weights) == {"Aesthetic Quality": pytest.approx(0.55)}
    torch.save(head | {"weight": torch.ones(1, 8)}, tmp_path / "head.pth")
    one, two = (readings("Aesthetic Quality", each, **weights)["Aesthetic Quality"] for each in (clip, noisy))
    assert abs(one - 0.55) <= math.sqrt(8) / 10 and one != pytest.approx(two, abs=1e-6)
    said = readings("Temp-C", replace(clip, prompt="a b"), clip=tmp_path)
    assert said == found, "what is said is no part of what is seen"


def test_a_folder_of_another_network_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    for key, name in (("clip", "Temp-C"), ("clap", "CS"), ("dinov3", "ID")):
        clip = Clip("a", 12.0, frames=moving(0, 2), waveform=tone(), rate_hz=RATE_HZ)
        clip = replace(clip, reference_image=moving(0, 1)[0], real=clip)
        with pytest.raises(UserError, match=rf"weights.{key}="):
            readings(name, clip, **{key: tmp_path})


def test_dino_reads_a_folder_of_timms_and_knows_the_same_picture_again(tmp_path: Path):
    import timm

    name = "vit_tiny_patch16_224"
    sizes: dict[str, Any] = {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 32}
    model = timm.create_model(name, pretrained=False, num_classes=0, **sizes)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    pretrained = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}
    config = {"architecture": name, "num_classes": 0, "model_args": sizes, "pretrained_cfg": pretrained}
    (tmp_path / "config.json").write_text(json.dumps(config))
    same = Clip("a", 12.0, frames=moving(0, 3), reference_image=moving(0, 1)[0])
    assert readings("ID", same, dinov3=tmp_path)["ID"] == pytest.approx(1, abs=1e-4)
    other = replace(same, reference_image=np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert readings("ID", other, dinov3=tmp_path)["ID"] < 0.99
    assert readings("DINO", same, dino=tmp_path)["DINO"] == pytest.approx(1, abs=1e-4)


def test_texts_and_frames_are_chosen_as_the_paper_says():
    assert embeddings.visual_part("[VISUAL]: A man in red. [SPEECH]: hello") == "A man in red."
    assert embeddings.visual_part("A man in red.") == "A man in red."
    assert embeddings.uniform(8, 49) == [3, 9, 15, 21, 27, 33, 39, 45]
    assert embeddings.uniform(8, 5) == [0, 1, 2, 3, 4]


def test_what_cannot_be_computed_names_the_network_it_lacks():
    absent = {n: m for n, m in registry.metrics().items() if any(isinstance(need, Absent) for need in m.meter.needs)}
    assert {"Audio-C", "Text-C", "Motion Smoothness"} <= set(absent)
    assert all(len(metric.meter.lacks(Tools())) == 1 for metric in absent.values())
    assert "ImageBind" in absent["Audio-C"].meter.lacks(Tools())[0]
    sync = registry.metrics()["Sync-C"].meter.lacks(Tools())
    assert ["weights.syncnet=PATH" in sync[0], "weights.s3fd=PATH" in sync[1]] == [True, True]


def test_every_kind_of_weights_has_a_key_of_its_own():
    needs = {need for metric in registry.metrics().values() for need in metric.meter.needs if isinstance(need, Weights)}
    assert len({need.key for need in needs}) == len(needs) >= 6


def test_a_sound_keeps_its_pitch_at_another_rate():
    heard = speech.heard_at(Sound(tone(hertz=440.0), RATE_HZ), 48000)
    assert len(heard) == 3 * len(tone())
    assert np.argmax(np.abs(np.fft.rfft(heard))) == pytest.approx(440 * 2, abs=1)
    assert math.isclose(float(np.abs(heard).max()), 0.1, rel_tol=0.05)


def test_clap_reads_a_released_folder_and_the_same_sound_is_at_no_distance(tmp_path: Path):
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    part: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = ClapConfig(
        text_config={**part, "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 32},
        audio_config={"patch_embeds_hidden_size": 8, "hidden_size": 64, "depths": [1, 1, 1, 1],
                      "num_attention_heads": [1, 1, 1, 1]},
        projection_dim=8,
    )  # fmt: skip
    ClapModel(config).save_pretrained(tmp_path)
    ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad").save_pretrained(tmp_path)
    save_tokenizer(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").iterdir():
        path.rename(tmp_path / path.name)
    clip = Clip("a", 12.0, waveform=tone(), rate_hz=RATE_HZ, prompt="a lamp")
    found = readings("CS", replace(clip, real=clip), clap=tmp_path)
    assert -1 <= found["CS"] <= 1
    own, real = np.split(np.array(found["FD-CLAP"]), 2)
    assert own == pytest.approx(real) and np.linalg.norm(own) == pytest.approx(1, abs=1e-5)
    assert found["FD-pair"] == pytest.approx(0, abs=1e-5)
    quiet = replace(clip, waveform=tone(level=0.04), real=clip)
    assert readings("CS", quiet, clap=tmp_path)["FD-pair"] == pytest.approx(0, abs=1e-5), "loudness is not heard"
    noise = np.random.default_rng(0).normal(0, 0.1, 12 * RATE_HZ).astype(np.float32)
    other = readings("CS", replace(clip, waveform=noise, real=clip), clap=tmp_path)
    assert readings("CS", replace(clip, waveform=noise, real=clip), clap=tmp_path) == other, "longer than it hears"
    own, real = np.split(np.array(other["FD-CLAP"]), 2)
    assert other["FD-pair"] == pytest.approx(2 - 2 * own @ real, abs=1e-5) and other["FD-pair"] > 1e-4


def test_raft_sees_frames_as_verse_bench_shows_them(tmp_path: Path):
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    model = raft_large(weights=None).eval()
    save_file(model.state_dict(), tmp_path / "raft.safetensors")
    frames = moving(2, 2, 132)[:, :124]
    found = readings("MS", Clip("a", 12.0, frames=frames), raft=tmp_path / "raft.safetensors")
    padded = np.pad(frames, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    shown = torch.from_numpy(padded).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.no_grad():
        flow = model(shown[:1], shown[1:], num_flow_updates=20)[-1]
    assert found["MS"] == pytest.approx(float(flow.abs().mean()), rel=1e-3)
    assert found["flow_raft"] == pytest.approx(float((flow**2).sum(1).sqrt().mean()), rel=1e-3)
    assert embeddings.shown_to_raft(np.zeros((1, 720, 1300, 3), np.uint8)).shape == (1, 3, 180, 325)
