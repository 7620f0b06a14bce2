"""What every test shares: at most two threads, a fixed seed for code that initialises weights, and no network."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Before any test file imports torch."""
    if config.getoption("numprocesses", None) is None:  # not in the process that starts workers: they inherit its word
        # Two threads in each of two workers wait for each other actively: some files then take ten times as long.
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(2, (os.cpu_count() or 1) // workers))))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: a worker that takes it last works while the others have ended."""
    items.sort(key=lambda item: item.path.name != "test_resume.py")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Weights are initialised from torch's global generator; each test then finds it in the same state."""
    torch = sys.modules.get("torch")  # tests of the torch-free half must not import it
    if torch is not None:
        torch.manual_seed(0)


# Released folders with tiny random weights, for every test that reads one.


@pytest.fixture(scope="session")
def cogvideox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with `vae/`, `text_encoder/` and `tokenizer/`, as CogVideoX is released."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("CogVideoX")
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4,
        "scaling_factor": 0.7,
    }  # fmt: skip
    AutoencoderKLCogVideoX(**settings).save_pretrained(folder / "vae")
    model = T5EncoderModel(
        T5Config(vocab_size=160, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    )
    model.save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")
    return folder


def save_tokenizer(folder: Path) -> None:
    """A sentencepiece model of few pieces in the released layout: spiece.model and its configuration."""
    import sentencepiece

    folder.mkdir()
    words = ["a woman talks to the camera", "two persons speak", "a ball hits the floor", "the lamp is on", "kitchen"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 4), model_prefix=str(folder / "spiece"), vocab_size=40, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    settings = {
        "tokenizer_class": "T5Tokenizer", "model_max_length": 226, "extra_ids": 100,
        "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def wav2vec2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder as wav2vec2-base-960h is released: the model with its CTC head."""
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    folder = tmp_path_factory.mktemp("wav2vec2")
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    settings = {"do_normalize": True, "sampling_rate": 16000, "feature_extractor_type": "Wav2Vec2FeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def save_wan_vae(folder: Path, **settings: Any) -> None:
    """A tiny AutoencoderKLWan; latents_mean and latents_std are random, one for each of `z_dim` channels."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    torch.manual_seed(0)
    stats = {
        "latents_mean": torch.randn(settings["z_dim"]).tolist(),
        "latents_std": (0.5 + torch.rand(settings["z_dim"])).tolist(),
    }
    AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **stats, **settings).save_pretrained(folder)


@pytest.fixture(scope="session")
def wan21_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with `vae/` as Wan 2.1 is released, whose config states no factors."""
    folder = tmp_path_factory.mktemp("Wan2.1")
    save_wan_vae(folder / "vae", z_dim=4)
    config = json.loads((folder / "vae" / "config.json").read_text())
    for name in ("is_residual", "in_channels", "out_channels", "patch_size", "decoder_base_dim",
                 "scale_factor_temporal", "scale_factor_spatial"):  # fmt: skip
        del config[name]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def wan22_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with `vae/`, `text_encoder/` and `tokenizer/`, as Wan2.2-TI2V-5B is released."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("Wan2.2")
    save_wan_vae(
        folder / "vae", z_dim=6, decoder_base_dim=16, patch_size=2, in_channels=12, out_channels=12, is_residual=True,
        scale_factor_spatial=16,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 160, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    UMT5EncoderModel(UMT5Config(**sizes)).save_pretrained(folder / "text_encoder")
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))  # as released
    save_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def mmaudio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with `audio_vae/` and `vocoder/`: the released spectrogram and rates, few channels."""
    import torch
    from diffusers.models.autoencoders.autoencoder_mmaudio import MMAudioVAE
    from diffusers.models.autoencoders.mmaudio_vocoder import MMAudioVocoder

    folder = tmp_path_factory.mktemp("MMAudio")
    torch.manual_seed(0)
    vae: Any = MMAudioVAE(hidden_channels=8, channel_multipliers=(1, 1), layers_per_block=1)
    torch.nn.init.constant_(vae.vae.data_mean, -5.0)
    torch.nn.init.constant_(vae.vae.data_std, 2.5)
    torch.nn.init.constant_(vae.vae.encoder.learnable_gain, 0.5)  # released ones are not 0, which the class starts at
    vae.save_pretrained(folder / "audio_vae")
    MMAudioVocoder(
        upsample_initial_channel=64, resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3),)
    ).save_pretrained(folder / "vocoder")
    return folder


@pytest.fixture(scope="session")
def ltx2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of a diffusers folder as LTX-2 is released, besides its transformer: released rates, few channels."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
    from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

    folder = tmp_path_factory.mktemp("LTX-2")
    torch.manual_seed(0)
    video: Any = AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(16, 32, 64),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1), encoder_causal=True,
        decoder_causal=False, spatial_compression_ratio=32, temporal_compression_ratio=8, scaling_factor=0.5,
    )  # fmt: skip
    audio: Any = AutoencoderKLLTX2Audio(base_channels=32, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2)
    for vae in (video, audio):
        vae.latents_mean.normal_()
        vae.latents_std.uniform_(0.5, 1.5)
    video.save_pretrained(folder / "vae")
    audio.save_pretrained(folder / "audio_vae")
    LTX2Vocoder(hidden_channels=32, resnet_kernel_sizes=[3], resnet_dilations=[[1]]).save_pretrained(folder / "vocoder")
    LTX2LatentUpsamplerModel(in_channels=8, mid_channels=32, num_blocks_per_stage=1).save_pretrained(
        folder / "latent_upsampler"
    )
    heads: dict[str, Any] = {}
    for stream in ("video", "audio"):
        heads |= {f"{stream}_connector_num_attention_heads": 2, f"{stream}_connector_attention_head_dim": 8}
        heads |= {f"{stream}_connector_num_layers": 1}
    LTX2TextConnectors(caption_channels=16, text_proj_in_factor=3, rope_type="split", **heads).save_pretrained(
        folder / "connectors"
    )
    text: dict[str, Any] = {
        "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 1, "intermediate_size": 32, "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    gemma: Any = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    torch.nn.init.normal_(gemma.model.language_model.embed_tokens.weight)  # words unlike each other
    gemma.save_pretrained(folder / "text_encoder")
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz[]:."]
    vocabulary = {word: number for number, word in enumerate(words)}
    GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True).save_pretrained(folder / "tokenizer")
    return folder
