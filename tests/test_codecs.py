"""Codecs: what survives encoding and decoding, and that released folders give what their stock models give."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avlit.codecs.build import build_audio_codec, build_text_encoder, build_track_encoder, build_video_codec
from avlit.codecs.embedded_audio import EmbeddedAudioCodec, EmbeddedTrackEncoder, mel_filters, power_spectrum
from avlit.codecs.embedded_text import EmbeddedTextEncoder
from avlit.codecs.embedded_video import CHANNEL_STD, EmbeddedVideoCodec
from avlit.errors import UserError
from data.clip import SUBSETS
from data.corpus import CorpusSettings, make_clip


def to_video(frames: np.ndarray | None) -> Tensor:
    """uint8 [F, H, W, 3] -> [1, 3, F, H, W] in [-1, 1]."""
    assert frames is not None
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def psnr(decoded: Tensor, video: Tensor) -> float:
    return 10 * math.log10(4 / (decoded - video).square().mean().item())


def talking_ellipse(num_frames: int = 25) -> tuple[Tensor, Tensor]:
    """A smooth face on a gradient, whose mouth opens by 1 to 4 pixels -> video [1, 3, F, 64, 64], openings [F]."""
    opening = 2.5 + 1.5 * torch.sin(torch.arange(num_frames) * 1.3)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    ground = torch.stack([x / 64, y / 64, 1 - x / 64]) * 0.6 - 0.4  # [3, H, W]
    face = torch.sigmoid((1 - ((x - 32) / 16) ** 2 - ((y - 32) / 21) ** 2) * 6)
    still = ground * (1 - face) + torch.tensor([0.7, 0.3, 0.1])[:, None, None] * face
    distance = ((x - 32) / 8) ** 2 + ((y - 42) / (1 + opening)[:, None, None]) ** 2  # [F, H, W]
    mouth = torch.sigmoid((1 - distance) * 4)
    video = still[:, None] * (1 - mouth) - 0.9 * mouth
    return video[None], opening


def speech_like(seconds: float = 1.0) -> Tensor:
    """A gliding voice of 120 to 160 Hz through two formants, in syllables -> [N] at 16 kHz."""
    time = torch.arange(int(seconds * 16000)) / 16000
    phase = 2 * math.pi * torch.cumsum(120 + 40 * time / seconds, 0) / 16000
    voice = torch.zeros_like(time)
    for harmonic in range(1, 30):
        frequency = harmonic * 140
        gain = math.exp(-(((frequency - 600) / 250) ** 2)) + 0.5 * math.exp(-(((frequency - 1700) / 300) ** 2))
        voice += gain * torch.sin(harmonic * phase)
    return 0.1 * voice * torch.sin(2 * math.pi * 2 * time).clamp_min(0)


def log_mel_db(waveform: Tensor) -> Tensor:
    """An analysis of its own, not the codec's: 40 bands, 512 samples."""
    power = power_spectrum(waveform, fft_size=512, hop=128) @ mel_filters(num_mels=40, fft_size=512, rate_hz=16000)
    return 10 * torch.log10(power + 1e-7)


def test_decoded_talking_face_has_34_db_and_keeps_a_mouth_of_a_few_pixels() -> None:
    video, opening = talking_ellipse()
    codec = EmbeddedVideoCodec()
    decoded = codec.decode(codec.encode(video))
    assert psnr(decoded, video) > 34.0  # measured 37.7
    dark = (decoded[0, :, :, 36:50, 24:41].mean(0) < -0.35).float().mean((1, 2))  # [F]
    assert np.corrcoef(dark.numpy(), opening.numpy())[0, 1] > 0.95  # 0.975; 0.993 before encoding


@pytest.mark.parametrize(("subset", "least_db"), list(zip(SUBSETS, (27, 28, 26, 27, 32), strict=True)))
def test_embedded_corpus_stays_recognisable(subset: str, least_db: float) -> None:
    # measured over the 24 clips that the scales come from: 28.5, 30.0, 27.4, 29.0 and 35.0 dB
    codec = EmbeddedVideoCodec()
    video = torch.cat([to_video(make_clip(subset, index, CorpusSettings()).frames) for index in range(100, 108)])
    decoded = codec.decode(codec.encode(video))
    assert psnr(decoded, video) > least_db
    assert all(psnr(*pair) > least_db - 3 for pair in zip(decoded, video, strict=True))


def test_channel_scales_are_those_of_the_corpus() -> None:
    codec = EmbeddedVideoCodec()
    clips = [make_clip(subset, index, CorpusSettings()) for subset in SUBSETS for index in range(3)]
    spread = torch.cat([codec.encode(to_video(clip.frames)) for clip in clips]).std((0, 2, 3, 4))  # [C]
    table = torch.tensor(CHANNEL_STD)
    assert spread[table > 2.5].min() > 0.7 and spread[table > 2.5].max() < 1.3  # constant terms: unit variance
    assert spread[table < 0.2].max() < 0.6  # the floor keeps detail small
    assert spread.max() < 1.5


def test_video_latents_are_causal_windows_of_four_frames() -> None:
    video, _ = talking_ellipse(9)
    codec = EmbeddedVideoCodec()
    latents = codec.encode(video)
    assert latents.shape == (1, 48, 3, 8, 8)
    changed = video.clone()
    changed[:, :, 5] += 0.1  # frame 5 is the first of window {5..8}
    moved = (codec.encode(changed) - latents).abs().amax((0, 1, 3, 4))
    assert moved[0] == 0 and moved[1] == 0 and moved[2] > 0.1
    assert torch.equal(codec.encode(video[:, :, :1]), latents[:, :, :1])  # the first frame needs no other
    repeated = torch.cat([video[:, :, :1], video[:, :, :1].expand(-1, -1, 4, -1, -1)], dim=2)
    still = codec.encode(repeated)
    torch.testing.assert_close(still[:, :, 0], still[:, :, 1], atol=1e-4, rtol=0)  # one scale for both kinds of window


def test_what_the_video_codec_keeps_it_gives_back_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = 0.1 * torch.randn(2, 48, 3, 4, 6, generator=generator)
    codec = EmbeddedVideoCodec()
    video = codec.decode(latents)
    assert video.shape == (2, 3, 9, 32, 48)
    torch.testing.assert_close(codec.encode(video)[:, :, 1:], latents[:, :, 1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("shape", "says"),
    [((1, 3, 24, 64, 64), "24 frames"), ((1, 3, 5, 60, 64), "60x64 pixels"), ((3, 5, 64, 64), "[B, 3, F, H, W]")],
)
def test_video_codec_refuses_what_it_cannot_encode(shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=r"embedded codec|multiples") as error:
        EmbeddedVideoCodec().encode(torch.zeros(shape))
    assert says in str(error.value)


def test_silence_has_no_track_features_and_speech_has_about_one() -> None:
    encoder = EmbeddedTrackEncoder()
    assert encoder.encode(torch.zeros(33333), num_frames=25).abs().max() == 0
    features = encoder.encode(speech_like(2.0), num_frames=25)
    assert features.shape == (25, 4, 32)
    assert 0.8 < features.quantile(0.95) < 2.5


@pytest.mark.parametrize("num_frames", [24, 25, 50, 200])
def test_track_features_stand_at_the_time_of_their_sound(num_frames: int) -> None:
    waveform = torch.zeros(32000)
    waveform[20000:20064] = 0.5  # 1.25 s
    features = EmbeddedTrackEncoder().encode(waveform, num_frames=num_frames).sum(-1).flatten()  # [F * K]
    center = (features * (torch.arange(len(features)) + 0.5)).sum() / features.sum() * 2.0 / len(features)
    assert abs(center - 1.252) < 0.006  # half a hop
    span = 2.0 / len(features)
    heard = torch.nonzero(features)[:, 0] * span
    assert heard.min() > 1.25 - 0.03 - span and heard.max() < 1.25 + 0.03 + span  # time stays local


def test_decoded_speech_has_the_spectrum_of_the_original() -> None:
    waveform = speech_like()
    codec = EmbeddedAudioCodec()
    latents = codec.encode(waveform[None])
    assert latents.shape == (1, 63, 64)
    decoded = codec.decode(latents)
    assert decoded.shape == (1, 63 * 256)
    reference = log_mel_db(waveform)
    distance = (log_mel_db(decoded[0])[: len(reference)] - reference).abs().mean()
    noise = torch.randn(len(waveform), generator=torch.Generator().manual_seed(0)) * waveform.std()
    assert distance < 1.2  # dB; measured 0.6
    assert (log_mel_db(noise) - reference).abs().mean() > 10 * distance  # the measure tells sounds apart
    assert torch.equal(codec.decode(latents), decoded)  # no chance in the phase


def test_audio_latents_have_unit_range_and_any_length_is_read() -> None:
    codec = EmbeddedAudioCodec()
    latents = codec.encode(torch.from_numpy(make_clip("basic_face", 0, CorpusSettings()).speech)[None])
    assert abs(latents.mean()) < 0.6 and 0.6 < latents.std() < 1.4
    assert codec.encode(torch.zeros(2, 1)).shape == (2, 1, 64)
    assert codec.decode(codec.encode(torch.zeros(1, 2560))).abs().max() < 1e-3


def test_a_word_is_one_vector_in_every_process() -> None:
    text = "Person1 is speaking."
    here = EmbeddedTextEncoder().encode(text)
    assert here.shape == (4, 64)  # three words and the full stop
    code = (
        "from avlit.codecs.embedded_text import EmbeddedTextEncoder;"
        f"print(EmbeddedTextEncoder().encode({text!r}).double().sum().item())"
    )
    root = Path(__file__).parents[1]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert float(there) == here.double().sum().item()


def test_words_are_alike_by_spelling_not_by_case_or_place() -> None:
    encoder = EmbeddedTextEncoder()
    features = encoder.encode("Blue sky, zyxomma, BLUE lamp")
    words = torch.nn.functional.normalize(features, dim=-1)
    assert words[0] @ words[5] > 0.85  # the same word at another place
    assert words[0] @ words[1] < 0.5 and words[0] @ words[3] < 0.5  # other words, known to nobody
    assert not torch.equal(features[0], features[5])  # but the order can be read
    assert torch.equal(encoder.encode("blue sky"), features[:2])


def test_long_text_is_cut_and_empty_text_has_no_tokens() -> None:
    encoder = EmbeddedTextEncoder()
    assert encoder.encode("").shape == (0, 64)
    long = encoder.encode(" ".join(f"word{index}" for index in range(60)))
    assert long.shape == (encoder.max_tokens, 64)
    assert torch.equal(long[:2], encoder.encode("word0 word1"))


def test_unknown_codec_names_list_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"codecs.video=ltx: .* one of embedded, cogvideox, wan2.1, wan2.2"):
        build_video_codec("ltx", tmp_path)
    with pytest.raises(ValueError, match=r"codecs.tracks=beats: .* one of embedded, wav2vec2"):
        build_track_encoder("beats")
    with pytest.raises(ValueError, match=r"codecs.text=clip: .* one of embedded, t5, umt5"):
        build_text_encoder("clip")
    with pytest.raises(ValueError, match=r"codecs.audio=encodec: .* one of embedded, mmaudio"):
        build_audio_codec("encodec")
    with pytest.raises(ValueError, match=r"codecs.video=cogvideox needs .* codecs.video_weights=FOLDER"):
        build_video_codec("cogvideox", None)


# --- released folders, with tiny random weights ---------------------------------------------------------------------


def test_cogvideox_latents_are_the_scaled_mode_of_the_stock_vae(cogvideox_folder: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

    codec = build_video_codec("cogvideox", cogvideox_folder)
    assert (codec.channels, codec.temporal_factor, codec.spatial_factor) == (4, 4, 8)
    video = torch.rand(2, 3, 9, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == (2, 4, 3, 2, 3)
    stock: Any = AutoencoderKLCogVideoX.from_pretrained(cogvideox_folder / "vae")
    with torch.no_grad():
        torch.testing.assert_close(latents, stock.encode(video).latent_dist.mode() * 0.7, atol=1e-5, rtol=1e-5)
        decoded = stock.decode(latents / 0.7).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(latents), decoded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 5, 9, 13, 21, 25])
def test_cogvideox_gives_back_as_many_frames_as_it_took(cogvideox_folder: Path, num_frames: int) -> None:
    # the stock decoder makes 4 T frames of an even number T of latents instead of 4 T - 3
    codec = build_video_codec("cogvideox", cogvideox_folder)
    latents = codec.encode(torch.zeros(1, 3, num_frames, 16, 16))
    assert latents.shape[2] == 1 + (num_frames - 1) // 4
    assert codec.decode(latents).shape == (1, 3, num_frames, 16, 16)


def test_t5_features_are_those_of_the_stock_model_padding_included(cogvideox_folder: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    encoder = build_text_encoder("t5", cogvideox_folder)
    prompt = "a woman talks to the camera"
    features = encoder.encode(prompt)
    tokenizer = AutoTokenizer.from_pretrained(cogvideox_folder / "tokenizer")
    tokens = tokenizer(prompt, padding="max_length", max_length=226, truncation=True, return_tensors="pt")
    with torch.no_grad():
        stock = T5EncoderModel.from_pretrained(cogvideox_folder / "text_encoder").eval()(tokens.input_ids)[0][0]
    assert features.shape == (226, encoder.dim) == (226, 16)
    torch.testing.assert_close(features, stock)
    assert encoder.encode("").shape == encoder.encode("a lamp " * 300).shape == (226, 16)


def test_wav2vec2_layers_are_the_stock_ones_at_its_own_rate(wav2vec2_folder: Path) -> None:
    from transformers import AutoFeatureExtractor, Wav2Vec2Model

    encoder = build_track_encoder("wav2vec2", wav2vec2_folder)
    waveform = speech_like()
    inputs = AutoFeatureExtractor.from_pretrained(wav2vec2_folder)(
        waveform.numpy(), sampling_rate=16000, return_tensors="pt"
    ).input_values
    with torch.no_grad():
        hidden = Wav2Vec2Model.from_pretrained(wav2vec2_folder).eval()(inputs, output_hidden_states=True).hidden_states
    stock = torch.stack(hidden[1:], dim=2)[0]  # [49, K, D]: 49 features of the convolutions in a second
    features = encoder.encode(waveform, num_frames=49)
    assert features.shape == (49, encoder.layers, encoder.dim) == (49, 3, 16)
    torch.testing.assert_close(features, stock, atol=1e-4, rtol=1e-4)


def test_wav2vec2_features_come_at_the_video_rate(wav2vec2_folder: Path) -> None:
    encoder = build_track_encoder("wav2vec2", wav2vec2_folder)
    waveform = speech_like(2.0)
    features = encoder.encode(waveform, num_frames=24)
    assert features.shape == (24, 3, 16)
    afterwards = encoder.encode(waveform, num_frames=99)  # interpolating the output instead is another thing
    resampled = torch.nn.functional.interpolate(
        afterwards.flatten(1).T[None], size=24, mode="linear", align_corners=True
    )[0].T
    assert not torch.allclose(features.flatten(1), resampled, atol=1e-3)
    assert encoder.encode(torch.zeros(16000), num_frames=12).isfinite().all()
    with pytest.raises(ValueError, match="N >= 400"):
        encoder.encode(torch.zeros(399), num_frames=12)


def test_identity_follows_weights_and_not_the_folder(cogvideox_folder: Path, tmp_path: Path) -> None:
    first = build_video_codec("cogvideox", cogvideox_folder).identity
    shutil.copytree(cogvideox_folder, tmp_path / "moved")
    assert build_video_codec("cogvideox", tmp_path / "moved").identity == first
    weights = next((tmp_path / "moved" / "vae").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    assert build_video_codec("cogvideox", tmp_path / "moved").identity != first


def test_folders_of_other_models_are_refused_by_name(
    cogvideox_folder: Path, wav2vec2_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"video_weights: there is no folder .*vae; expected .*AutoencoderKLCogVideoX"):
        build_video_codec("cogvideox", wav2vec2_folder)
    with pytest.raises(ValueError, match=r"tracks_weights: .* holds .*T5EncoderModel.*expected .*Wav2Vec2Model"):
        build_track_encoder("wav2vec2", cogvideox_folder / "text_encoder")
    other = tmp_path / "other"
    shutil.copytree(cogvideox_folder / "vae", other / "vae")
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(ValueError, match=r"holds AutoencoderKLWan; expected"):
        build_video_codec("cogvideox", other)
    (other / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        build_video_codec("cogvideox", other)


def test_folders_without_whole_safetensors_are_refused(wav2vec2_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "wav2vec2"
    shutil.copytree(wav2vec2_folder, folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if "layers.1." not in name}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"not all of a Wav2Vec2Model: \d+ missing \(encoder.layers.1."):
        build_track_encoder("wav2vec2", folder).encode(speech_like(), num_frames=12)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as Wav2Vec2Model"):
        build_track_encoder("wav2vec2", folder).encode(speech_like(), num_frames=12)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin; pickled weights are not opened"):
        build_track_encoder("wav2vec2", folder)


@pytest.mark.parametrize(
    ("part", "name", "content", "message"),
    [
        ("vae", "config.json", {"temporal_compression_ratio": 0}, "is not of a CogVideoX VAE: temporal_compr.*=0,"),
        ("vae", "config.json", {"scaling_factor": float("nan")}, "is not of a CogVideoX VAE: .*scaling_factor=nan"),
        ("vae", "config.json", {"latent_channels": "many"}, "is not of a CogVideoX VAE: .*'many'"),
        ("vae", "config.json", {"act_fn": "sing"}, "cannot be read as AutoencoderKLCogVideoX: .*sing"),
        ("text_encoder", "config.json", {"d_model": "wide"}, "cannot be read as T5Config: .*d_model"),
        ("text_encoder", "config.json", {"dtype": "soft"}, "cannot be read as T5Config: .*soft"),
        ("text_encoder", "config.json", "[" * 100_000, "is not JSON"),
        ("tokenizer", "tokenizer_config.json", {"added_tokens_decoder": 3}, "cannot be read as T5Tokenizer: "),
        ("tokenizer", "tokenizer_config.json", {"pad_token": None}, "cannot be read as T5Tokenizer: .*padding token"),
        ("tokenizer", "spiece.model", "x", "cannot be read as T5Tokenizer: "),
        ("audio", "config.json", {"num_attention_heads": 0}, "cannot be read as Wav2Vec2Model: .*zero"),
        ("audio", "config.json", {"conv_kernel": [1]}, "cannot be read as Wav2Vec2Config: "),
        ("audio", "preprocessor_config.json", "{", "is not JSON"),
    ],
    ids=str,
)
def test_a_released_folder_that_makes_no_sense_is_a_users_error(
    cogvideox_folder: Path, wav2vec2_folder: Path, tmp_path: Path, part: str, name: str, content: Any, message: str
) -> None:
    folder = tmp_path / "released"
    shutil.copytree(cogvideox_folder, folder)
    shutil.copytree(wav2vec2_folder, folder / "audio")
    path = folder / part / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    key = {"vae": "video", "audio": "tracks"}.get(part, "text")
    with pytest.raises(UserError, match=rf"(?s)codecs\.{key}_weights: .*{message}"):
        if part == "vae":
            build_video_codec("cogvideox", folder).encode(torch.zeros(1, 3, 1, 16, 16))
        elif part == "audio":
            build_track_encoder("wav2vec2", folder / "audio").encode(torch.zeros(16000), num_frames=12)
        else:
            build_text_encoder("t5", folder).encode("a lamp")
