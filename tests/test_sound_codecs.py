"""Codecs of the recipes that generate sound: Wan's VAEs and umT5, MMAudio's VAE and vocoder, at tiny random weights."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from avlit.codecs import VideoCodec
from avlit.codecs.build import build_audio_codec, build_text_encoder, build_video_codec
from avlit.codecs.mmaudio import LATENT_STATS, MMAudioCodec, write_latent_stats
from avlit.errors import UserError


@pytest.fixture(params=["wan21_folder", "wan22_folder"])
def wan_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def wan_codec(folder: Path) -> VideoCodec:
    return build_video_codec("wan2.1" if "2.1" in str(folder) else "wan2.2", folder)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in [-1, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tones(num_samples: int) -> Tensor:
    """Three steady sines, fading, over faint noise -> [1, N] at 44.1 kHz."""
    time = torch.arange(num_samples) / 44100
    waves = sum(torch.sin(2 * math.pi * frequency * time) for frequency in (220.0, 1760.0, 9000.0))
    return (0.2 * torch.exp(-2 * time) * waves)[None] + 0.01 * noise(1, num_samples)


# --- Wan's VAEs -----------------------------------------------------------------------------------------------------


def test_wan_latents_are_those_that_the_pipelines_normalise(wan_folder: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    stock: Any = AutoencoderKLWan.from_pretrained(wan_folder / "vae")
    codec = wan_codec(wan_folder)
    size = codec.spatial_factor
    assert (codec.channels, codec.temporal_factor, size) == ((4, 4, 8) if "2.1" in str(wan_folder) else (6, 4, 16))
    video = noise(2, 3, 9, 2 * size, 3 * size)
    latents = codec.encode(video)
    assert latents.shape == (2, codec.channels, 3, 2, 3)
    # pipeline_wan_i2v.py: latents_std is the inverse of the config's there
    mean = torch.tensor(stock.config.latents_mean).view(1, -1, 1, 1, 1)
    inverse = 1.0 / torch.tensor(stock.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        modes = stock.encode(video).latent_dist.mode()
        decoded = stock.decode(latents / inverse + mean).sample  # pipeline_wan.py
    torch.testing.assert_close(latents, (modes - mean) * inverse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec.decode(latents), decoded, atol=1e-5, rtol=1e-5)
    assert torch.equal(codec.encode(video), latents)  # the mode, not a sample


@pytest.mark.parametrize("num_frames", [1, 5, 13])
def test_wan_gives_back_as_many_frames_as_it_took(wan_folder: Path, num_frames: int) -> None:
    codec = wan_codec(wan_folder)
    latents = codec.encode(torch.zeros(1, 3, num_frames, 32, 32))
    assert latents.shape[2] == 1 + (num_frames - 1) // 4
    video = codec.decode(latents)
    assert video.shape == (1, 3, num_frames, 32, 32) and video.abs().max() <= 1


def test_a_vae_of_the_other_wan_is_refused(wan21_folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"codecs\.video=wan2\.2: the VAE in .* divides space by 8, that of wan2\.2 by 16"
    ):
        build_video_codec("wan2.2", wan21_folder)


def test_wan_latents_know_nothing_of_later_frames(wan_folder: Path) -> None:
    codec = wan_codec(wan_folder)
    video = noise(1, 3, 9, 32, 32)
    latents = codec.encode(video)
    torch.testing.assert_close(codec.encode(video[:, :, :5]), latents[:, :, :2], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(codec.decode(latents[:, :, :2]), codec.decode(latents)[:, :, :5], atol=1e-6, rtol=1e-6)
    changed = video.clone()
    changed[:, :, 5:] += 0.5
    moved = (codec.encode(changed) - latents).abs().amax((0, 1, 3, 4))
    assert moved[:2].max() < 1e-6 and moved[2] > 1e-3


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 3, 8, 32, 32), r"4n \+ 1 frames"),
        ((3, 5, 32, 32), r"\[B, 3, F, H, W\]"),
        ((1, 3, 5, 32, 40), "multiples of 16"),
    ],
)
def test_wan_refuses_video_that_it_would_cut(wan22_folder: Path, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_video_codec("wan2.2", wan22_folder).encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"decodes \[B, 6, T, h, w\]"):
        build_video_codec("wan2.2", wan22_folder).decode(torch.zeros(1, 16, 1, 2, 2))


# --- umT5 -----------------------------------------------------------------------------------------------------------

PROMPTS = ["a woman talks to the camera", "", "  the&amp;amp;lamp \n is\ton &lt;b&gt; ", "a lamp " * 300]


@pytest.fixture(scope="session")
def pipeline(wan22_folder: Path) -> Any:
    """diffusers' own WanPipeline of the folder's text encoder and tokenizer."""
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    parts: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(wan22_folder / "tokenizer"),
        "text_encoder": UMT5EncoderModel.from_pretrained(wan22_folder / "text_encoder").eval(),
    }
    return WanPipeline(**parts, vae=None, scheduler=None, transformer=None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["plain", "empty", "to be cleaned", "long"])
def test_text_filled_up_to_512_is_what_wan_reads(wan22_folder: Path, pipeline: Any, prompt: str) -> None:
    encoder = build_text_encoder("umt5", wan22_folder)
    features = encoder.encode(prompt)
    assert features.shape[1] == encoder.dim == 16 and 1 <= len(features) <= encoder.max_tokens == 512
    with torch.no_grad():
        stock, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=512, device=torch.device("cpu")
        )
    assert stock.abs().sum((0, 2)).count_nonzero() == len(features)  # trimmed where the pipeline's zeros begin
    filled = torch.nn.functional.pad(features, (0, 0, 0, 512 - len(features)))
    torch.testing.assert_close(filled, stock[0], atol=1e-5, rtol=1e-5)


def test_a_prompt_has_its_words_an_end_and_no_padding(wan22_folder: Path) -> None:
    encoder = build_text_encoder("umt5", wan22_folder)
    assert encoder.encode("").shape == (1, 16)
    assert encoder.encode("a lamp " * 300).shape == (512, 16)
    assert torch.equal(encoder.encode(" the \n lamp"), encoder.encode("the lamp"))
    assert not torch.equal(encoder.encode("the lamp"), encoder.encode("lamp the"))


def test_wan_text_encoders_embedding_is_the_released_one(wan22_folder: Path, tmp_path: Path) -> None:
    # releases say tie_word_embeddings=false and hold `shared.weight` alone: some transformers leave the encoder zeros
    weights = load_file(wan22_folder / "text_encoder" / "model.safetensors")
    assert "shared.weight" in weights and "encoder.embed_tokens.weight" not in weights
    shutil.copytree(wan22_folder, tmp_path / "negated")
    weights["shared.weight"] = -weights["shared.weight"]
    save_file(weights, tmp_path / "negated" / "text_encoder" / "model.safetensors", {"format": "pt"})
    here, there = (
        build_text_encoder("umt5", folder).encode("the lamp is on") for folder in (wan22_folder, tmp_path / "negated")
    )
    assert here.std() > 0.1 and not torch.allclose(here, there, atol=0.1)


# --- MMAudio --------------------------------------------------------------------------------------------------------


def hertz_of_mels(count: int) -> np.ndarray:
    """Frequencies equally spaced on Slaney's mel scale from 0 to 22050 Hz: linear to 1 kHz, then 27 mels for 6.4x."""
    top = 15 + 27 * np.log(22.05) / np.log(6.4)
    mels = np.linspace(0, top, count)
    return np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))


def log_mel(waveform: np.ndarray) -> np.ndarray:
    """MMAudio's spectrogram, in float64 by its description: [N] -> [128, N // 512]."""
    padded = np.pad(waveform.astype(np.float64), 768, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2048)[::512]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)
    magnitude = np.sqrt(np.abs(np.fft.rfft(frames * hann)) ** 2 + 1e-9)  # [M, 1025]
    edges, bins = hertz_of_mels(130), np.arange(1025) * 44100 / 2048
    bands = [
        np.interp(bins, edges[band : band + 3], [0, 1, 0]) * 2 / (edges[band + 2] - edges[band]) for band in range(128)
    ]
    return np.log(np.maximum(np.stack(bands) @ magnitude.T, 1e-5))


def test_mmaudio_latents_are_the_scaled_mode_over_its_log_mel_spectrogram(mmaudio_folder: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_mmaudio import MMAudioVAE

    codec = build_audio_codec("mmaudio", mmaudio_folder)
    waveform = tones(22050)
    latents = codec.encode(waveform)
    mel = log_mel(waveform[0].numpy())
    assert mel.shape == (128, 43) and mel.min() < -4 and mel.max() > 0
    stock: Any = MMAudioVAE.from_pretrained(mmaudio_folder / "audio_vae")
    with torch.no_grad():
        mean, _ = stock.vae.encode(torch.from_numpy(mel).float()[None]).chunk(2, dim=1)
    assert latents.shape == (1, 21, 40) and latents.std() > 0.1
    torch.testing.assert_close(latents, mean.transpose(1, 2) * 0.417, atol=1e-3, rtol=1e-3)
    assert torch.equal(codec.encode(waveform), latents)


def test_mmaudio_decodes_as_diffusers_pipeline_does(mmaudio_folder: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_mmaudio import MMAudioVAE
    from diffusers.models.autoencoders.mmaudio_vocoder import MMAudioVocoder

    vae: Any = MMAudioVAE.from_pretrained(mmaudio_folder / "audio_vae")
    vocoder: Any = MMAudioVocoder.from_pretrained(mmaudio_folder / "vocoder")
    latents = noise(2, 11, 40)
    with torch.no_grad():  # pipeline_kandinsky6_ti2va.py
        stock = vocoder(vae.decode(latents.transpose(1, 2) / 0.417).sample).sample[:, 0]
    decoded = build_audio_codec("mmaudio", mmaudio_folder).decode(latents)
    assert decoded.shape == (2, 11 * 1024) and decoded.std() > 0
    torch.testing.assert_close(decoded, stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("duration_s", "count"), [(5.0, 215), (121 / 24, 217), (8.0, 344), (1024 / 44100, 1), (0.02, 0)]
)
def test_a_duration_has_as_many_latents_as_its_sound_is_encoded_to(
    mmaudio_folder: Path, duration_s: float, count: int
) -> None:
    codec = MMAudioCodec(mmaudio_folder)
    assert codec.num_latents(duration_s) == count
    if count:
        assert codec.encode(torch.zeros(1, round(duration_s * codec.rate_hz))).shape == (1, count, 40)


def test_sound_of_whole_latents_comes_back_as_long_as_it_was(mmaudio_folder: Path) -> None:
    codec = build_audio_codec("mmaudio", mmaudio_folder)
    assert (codec.channels, codec.rate_hz) == (40, 44100)
    waveform = codec.decode(codec.encode(tones(13 * 1024 + 1023)))
    assert waveform.shape == (1, 13 * 1024) and waveform.abs().max() <= 1
    assert codec.encode(waveform).shape == (1, 13, 40)
    for shape in ((1, 1023), (44100,)):
        with pytest.raises(ValueError, match=r"reads mono samples \[B, N\], N >= 1024"):
            codec.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"decodes \[B, L, 40\]"):
        codec.decode(torch.zeros(1, 40, 13))


def test_measured_statistics_make_unit_latents_and_decode_to_the_same_sound(
    mmaudio_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "measured"
    shutil.copytree(mmaudio_folder, folder)
    scaled = build_audio_codec("mmaudio", folder)
    waveforms = [noise(2, 20480, seed=1), tones(44100), 0.1 * noise(1, 30000, seed=2)]
    assert write_latent_stats(folder, waveforms) == folder / LATENT_STATS
    codec = build_audio_codec("mmaudio", folder)
    assert codec.identity != scaled.identity
    latents = torch.cat([codec.encode(waveform).flatten(0, 1) for waveform in waveforms])  # [sum of B * L, D]
    torch.testing.assert_close(latents.mean(0), torch.zeros(40), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(0, correction=0), torch.ones(40), atol=1e-4, rtol=0)
    modes = scaled.encode(waveforms[1]) / 0.417
    assert not torch.allclose(modes.flatten(0, 1).std(0), torch.ones(40), atol=0.1)  # unlike before
    torch.testing.assert_close(
        codec.decode(codec.encode(waveforms[1])), scaled.decode(scaled.encode(waveforms[1])), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(UserError, match=r"is there already, and shards may be made with it"):
        write_latent_stats(folder, waveforms)


@pytest.mark.parametrize("waveforms", [[], [torch.zeros(1, 1024)]], ids=["none", "one latent"])
def test_statistics_of_too_little_sound_are_not_written(
    mmaudio_folder: Path, tmp_path: Path, waveforms: list[Tensor]
) -> None:
    shutil.copytree(mmaudio_folder, tmp_path / "measured")
    with pytest.raises(UserError, match=rf"{len(waveforms)} latents are too few"):
        write_latent_stats(tmp_path / "measured", waveforms)
    assert not list((tmp_path / "measured").glob("latent_stats*"))


@pytest.mark.parametrize(
    ("stats", "says"),
    [
        ({"mean": torch.zeros(40)}, r"`mean` and `std` of 40 .* it has mean \[40\]"),
        ({"mean": torch.zeros(20), "std": torch.ones(20)}, r"it has mean \[20\], std \[20\]"),
        ({"mean": torch.zeros(40), "std": torch.zeros(40)}, "a std that is not above 0"),
        ({"mean": torch.full((40,), math.nan), "std": torch.ones(40)}, "not finite"),
        (b"\x80\x04}", LATENT_STATS),
    ],
    ids=["no std", "20 channels", "zero std", "nan", "a pickle"],
)
def test_statistics_of_other_latents_are_refused(
    mmaudio_folder: Path, tmp_path: Path, stats: dict[str, Tensor] | bytes, says: str
) -> None:
    folder = tmp_path / "measured"
    shutil.copytree(mmaudio_folder, folder)
    if isinstance(stats, bytes):
        (folder / LATENT_STATS).write_bytes(stats)
    else:
        save_file(stats, folder / LATENT_STATS)
    with pytest.raises(UserError, match=rf"codecs\.audio_weights: .*{says}"):
        build_audio_codec("mmaudio", folder)


# --- folders --------------------------------------------------------------------------------------------------------

BUILD: dict[str, Callable[[Path], Any]] = {
    "vae": lambda folder: build_video_codec("wan2.2", folder),
    "text_encoder": lambda folder: build_text_encoder("umt5", folder),
    "tokenizer": lambda folder: build_text_encoder("umt5", folder),
    "audio_vae": lambda folder: build_audio_codec("mmaudio", folder),
    "vocoder": lambda folder: build_audio_codec("mmaudio", folder),
}
KEYS = {"vae": "video", "text_encoder": "text", "tokenizer": "text", "audio_vae": "audio", "vocoder": "audio"}
MODELS = [part for part in KEYS if part != "tokenizer"]


@pytest.fixture
def released(wan22_folder: Path, mmaudio_folder: Path, tmp_path: Path) -> Path:
    """One folder with every part, to be changed."""
    shutil.copytree(wan22_folder, tmp_path / "released")
    shutil.copytree(mmaudio_folder, tmp_path / "released", dirs_exist_ok=True)
    return tmp_path / "released"


def use(part: str, folder: Path) -> None:
    """Builds the codec that reads `part`, and makes it read its weights."""
    codec = BUILD[part](folder)
    if part == "vae":
        codec.encode(torch.zeros(1, 3, 1, 32, 32))
    elif KEYS[part] == "text":
        codec.encode("a lamp")
    else:
        codec.decode(codec.encode(torch.zeros(1, 2048)))


@pytest.mark.parametrize("part", MODELS)
def test_identity_follows_the_weights_of_each_part(released: Path, tmp_path: Path, part: str) -> None:
    first = BUILD[part](released).identity
    shutil.copytree(released, tmp_path / "moved")
    assert BUILD[part](tmp_path / "moved").identity == first
    weights = next((tmp_path / "moved" / part).glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    assert BUILD[part](tmp_path / "moved").identity != first


def test_text_cleaned_in_another_way_has_another_identity(wan22_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identities = set()
    for spec in (None, object()):
        monkeypatch.setattr("avlit.codecs.wan.find_spec", lambda name, spec=spec: spec if name == "ftfy" else None)
        identities.add(build_text_encoder("umt5", wan22_folder).identity)
    assert len(identities) == 2


@pytest.mark.parametrize("part", list(KEYS))
def test_a_missing_part_is_named(released: Path, part: str) -> None:
    shutil.rmtree(released / part)
    with pytest.raises(UserError, match=rf"codecs\.{KEYS[part]}_weights: .*{part}.*expected"):
        BUILD[part](released)


def test_codecs_that_need_a_folder_ask_for_it() -> None:
    builders = {"video=wan2.2": build_video_codec, "text=umt5": build_text_encoder, "audio=mmaudio": build_audio_codec}
    for choice, build in builders.items():
        key, name = choice.split("=")
        with pytest.raises(UserError, match=rf"codecs\.{re.escape(choice)} needs .* codecs\.{key}_weights=FOLDER"):
            build(name)


@pytest.mark.parametrize("part", MODELS)
def test_pickled_weights_of_sound_codecs_are_not_opened(released: Path, part: str) -> None:
    for weights in (released / part).glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"no \.safetensors weights \(only .*\.bin; pickled weights are not opened\)"):
        BUILD[part](released)


@pytest.mark.parametrize("part", MODELS)
def test_weights_that_lack_a_tensor_are_refused(released: Path, part: str) -> None:
    path = next((released / part).glob("*.safetensors"))
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("weight") and "shared" not in name)
    save_file({name: value for name, value in tensors.items() if name != lost}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"not all of a .*: 1 missing \({lost}\)"):
        use(part, released)


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("vae", {"_class_name": "AutoencoderKLCogVideoX"}, "holds AutoencoderKLCogVideoX; expected .*AutoencoderKLWan"),
        ("vae", {"scale_factor_spatial": 8}, "scale_factor_spatial=8, and layers that make 16"),
        ("vae", {"temperal_downsample": [False, True, False], "scale_factor_temporal": 2}, "not two halvings of time"),
        ("vae", {"latents_std": [1.0] * 16}, "6 latents_mean and 16 latents_std of z_dim=6"),
        ("vae", {"latents_std": [0.0] * 6}, "latents_std above 0"),
        ("vae", {"latents_mean": [float("nan")] * 6}, "must be finite"),
        ("vae", {"latents_mean": "none"}, "is not of a Wan VAE: "),
        ("text_encoder", {"architectures": ["T5EncoderModel"]}, "holds .*T5EncoderModel.*expected .*UMT5EncoderModel"),
        ("text_encoder", {"vocab_size": 20}, r"tokenizer has \d+ tokens, the model in .* knows 20"),
        ("text_encoder", {"d_model": "wide"}, "cannot be read as UMT5Config: .*d_model"),
        ("audio_vae", {"scaling_factor": 0}, "is not of an MMAudio VAE: scaling_factor=0"),
        ("audio_vae", {"n_fft": 256}, "is not of an MMAudio VAE: n_fft=256, hop_length=512"),
        ("audio_vae", {"mel_bins": 80}, "samples of 128 mel bands, .* reads 80 bands every 512"),
        ("vocoder", {"upsample_rates": [4, 4, 2, 2, 2, 2]}, "makes 256 samples of 128 .* bands every 512"),
        ("vocoder", {"upsample_rates": "fast"}, "is not of an MMAudio vocoder: "),
        ("vocoder", {"_class_name": "LTX2Vocoder"}, "holds LTX2Vocoder; expected .*MMAudioVocoder"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_a_users_error(
    released: Path, part: str, values: dict[str, Any], says: str
) -> None:
    path = released / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UserError, match=rf"(?s)codecs\.{KEYS[part]}_weights: .*{says}"):
        BUILD[part](released)


@pytest.mark.parametrize(("part", "name"), [("vae", "latents_std"), ("audio_vae", "sample_rate")])
def test_a_config_without_a_key_is_named(released: Path, part: str, name: str) -> None:
    path = released / part / "config.json"
    config = json.loads(path.read_text())
    del config[name]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json lacks {name}; download it again"):
        BUILD[part](released)
