"""Released codecs and encoders from local folders: CogVideoX's VAE, T5 v1.1 and wav2vec2.

Their weights are read when they are first used: a training run on encoded shards needs the encoders' identity alone.

BEATs, which MTV names for its effects track, is a gap: no library that this project uses carries the model, and its
authors' code loads pickled weights only. MTV's released code encodes all three tracks with wav2vec2, and so does this.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from avlit.errors import UserError

LEADS_ELSEWHERE = {
    "_attn_implementation": "names code to be fetched",
    "attn_implementation": "names code to be fetched",
    "quantization_config": "makes other weights of those in the folder, with code of its own",
    "compression_config": "makes other weights of those in the folder, with code of its own",
    "transformers_weights": "names another file of weights",
}
"""Keys of a config.json that no release has which is read here, and why they are refused: see `model_folder`."""


class CogVideoXCodec:
    """diffusers' AutoencoderKLCogVideoX from `folder/vae`: 4x time, 8x space, 16 channels as released.

    Encoding takes the mode of the latent distribution, not a sample: the same video gives the same shard, and the
    posterior's spread is small beside its scale.
    """

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._source, config = model_folder(
            "codecs.video_weights", folder / "vae", "_class_name", ("AutoencoderKLCogVideoX",)
        )
        self._device, self._dtype = device, dtype
        for name in ("latent_channels", "temporal_compression_ratio", "block_out_channels", "scaling_factor"):
            if name not in config:
                raise UserError(f"codecs.video_weights: {self._source / 'config.json'} lacks {name}; download it again")
        with as_user_error(f"codecs.video_weights: {self._source / 'config.json'} is not of a CogVideoX VAE"):
            self.channels: int = int(config["latent_channels"])
            self.temporal_factor: int = int(config["temporal_compression_ratio"])
            self.spatial_factor: int = 2 ** (len(config["block_out_channels"]) - 1)
            self.scaling_factor: float = float(config["scaling_factor"])
            if self.temporal_factor < 1 or not (math.isfinite(self.scaling_factor) and self.scaling_factor):
                raise ValueError(
                    f"temporal_compression_ratio={self.temporal_factor}, scaling_factor={self.scaling_factor}"
                )
        self.identity = f"AutoencoderKLCogVideoX-{fingerprint(model_files(self._source))}"

    @cached_property
    def _vae(self) -> Any:
        from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

        vae = load_model("codecs.video_weights", AutoencoderKLCogVideoX, self._source, self._dtype).to(self._device)
        vae.enable_slicing()  # one clip at a time: the memory of one, the same numbers
        return vae

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [-1, 1], F = 4n + 1 -> latents [B, C, n + 1, H/8, W/8] times the VAE's scaling factor."""
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % self.temporal_factor != 1:
            raise ValueError(
                f"video of shape {tuple(video.shape)}: CogVideoX's VAE reads [B, 3, F, H, W] of "
                f"F = {self.temporal_factor}n + 1 frames"
            )
        moved = video.to(self._vae.device, self._vae.dtype)
        latents = self._vae.encode(moved).latent_dist.mode() * self.scaling_factor
        return latents.to(video.device, torch.float32)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, T, h, w] -> video [B, 3, 4(T - 1) + 1, 8h, 8w], clipped to [-1, 1]."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: this VAE decodes [B, {self.channels}, T, h, w]")
        num_frames = self.temporal_factor * (latents.shape[2] - 1) + 1
        if latents.shape[2] % 2 == 0:
            # the decoder treats the first latent as a lone frame only in an odd number; being causal, it can be given
            # one more at the end, whose frames are cut off again
            latents = torch.cat([latents, latents[:, :, -1:]], dim=2)
        moved = latents.to(self._vae.device, self._vae.dtype) / self.scaling_factor
        video = self._vae.decode(moved).sample[:, :, :num_frames]
        return video.to(latents.device, torch.float32).clamp(-1.0, 1.0)


class T5Encoder:
    """transformers' T5EncoderModel from `folder/text_encoder` and `folder/tokenizer`, as CogVideoX uses T5 v1.1-xxl.

    The prompt is padded to `max_tokens` and encoded without an attention mask, padding features and all: the released
    backbones attend to them. Longer prompts are cut.
    """

    max_tokens = 226

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._source, _ = model_folder(
            "codecs.text_weights", folder / "text_encoder", "architectures", ("T5EncoderModel",)
        )

        from transformers import T5Config

        with as_user_error(f"codecs.text_weights: {self._source / 'config.json'} cannot be read as T5Config"):
            config = T5Config.from_pretrained(self._source, local_files_only=True)
        self._tokenizer, words = load_tokenizer(folder / "tokenizer", model=self._source, vocab_size=config.vocab_size)
        self.dim: int = config.d_model
        self._device, self._dtype = device, dtype
        self.identity = f"T5EncoderModel-{self.max_tokens}-{fingerprint([*model_files(self._source), *words])}"

    @cached_property
    def _model(self) -> Any:
        from transformers import T5EncoderModel

        return load_model("codecs.text_weights", T5EncoderModel, self._source, self._dtype).to(self._device)

    @torch.no_grad()
    def encode(self, text: str) -> Tensor:
        """A prompt -> [226, D] on the CPU, the padding's features included."""
        tokens = self._tokenizer(
            text, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        features = self._model(tokens.input_ids.to(self._model.device)).last_hidden_state  # [1, 226, D]
        return features[0].float().cpu()


class Wav2Vec2Encoder:
    """transformers' Wav2Vec2Model: every hidden layer, computed at the video's frame rate (MTV, audio_processor.py).

    The convolutions' features (50 a second) are interpolated to the number of video frames before the transformer
    reads them, so its layers attend over video frames; resampling its output instead gives other features.
    """

    rate_hz = 16000

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        released = ("Wav2Vec2Model", "Wav2Vec2ForCTC", "Wav2Vec2ForPreTraining")
        self._source, _ = model_folder("codecs.tracks_weights", folder, "architectures", released)

        from transformers import Wav2Vec2Config

        with as_user_error(f"codecs.tracks_weights: {self._source / 'config.json'} cannot be read as Wav2Vec2Config"):
            config = Wav2Vec2Config.from_pretrained(self._source, local_files_only=True)
            self._shortest = 1  # samples that give one feature of the convolutions
            for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
                self._shortest = (self._shortest - 1) * stride + kernel
        self._device, self._normalise = device, _reads_normalised(self._source, self.rate_hz)
        self.layers: int = config.num_hidden_layers
        self.dim: int = config.hidden_size
        self.identity = f"Wav2Vec2Model-{fingerprint(model_files(self._source))}"

    @cached_property
    def _model(self) -> Any:
        from transformers import Wav2Vec2Model

        unused = ("masked_spec_embed",)  # never used outside of training, and left out of some releases
        return load_model("codecs.tracks_weights", Wav2Vec2Model, self._source, torch.float32, unused).to(self._device)

    @torch.no_grad()
    def encode(self, waveform: Tensor, *, num_frames: int) -> Tensor:
        """[N] mono in [-1, 1] at 16 kHz, covering the clip -> [F, K, D], layer k in [:, k]; silence is all zeros in."""
        if waveform.ndim != 1 or waveform.numel() < self._shortest:
            raise ValueError(
                f"a track of shape {tuple(waveform.shape)}: wav2vec2 reads mono samples [N], N >= {self._shortest}"
            )
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames}: a clip has at least one frame")
        samples = waveform.to(self._model.device, torch.float32)
        if self._normalise:  # as transformers' Wav2Vec2FeatureExtractor
            samples = (samples - samples.mean()) / torch.sqrt(samples.var(correction=0) + 1e-7)
        features = self._model.feature_extractor(samples[None])  # [1, D', M]
        features = F.interpolate(features, size=num_frames, mode="linear", align_corners=True).transpose(1, 2)
        hidden, _ = self._model.feature_projection(features)  # [1, F, D]
        layers: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda *call: layers.append(call[2])) for layer in
                 self._model.encoder.layers[:-1]]  # fmt: skip
        try:
            last = self._model.encoder(hidden).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([*layers, last]).transpose(0, 1).to(waveform.device)  # [F, K, D]


def fingerprint(files: Iterable[Path]) -> str:
    """Names, sizes and contents of files as one xxh3 of 128 bits; the folder's place does not count."""
    digest = xxhash.xxh3_128()
    for path in sorted(files, key=lambda path: path.name):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def model_files(source: Path) -> list[Path]:
    return [source / "config.json", *sorted(source.glob("*.safetensors"))]


def model_folder(key: str, source: Path, field: str, expected: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """`source` and its config.json, which must name an expected class; the folder must have safetensors weights.

    Nothing in it may lead the loaders to code or to weights outside the files that the fingerprint covers.
    """
    wanted = f"expected a folder of {' or '.join(expected)} with config.json and .safetensors weights"
    if not source.is_dir():
        raise UserError(f"{key}: there is no folder {source}; {wanted}")
    if not (source / "config.json").is_file():
        raise UserError(f"{key}: {source} has no config.json; {wanted}")
    config = _read_json(key, source / "config.json", wanted)
    found = config.get(field)
    if not any(name in expected for name in (found if isinstance(found, list) else [found])):
        other = found or config.get("_class_name") or config.get("architectures") or "a config that names no class"
        raise UserError(f"{key}: {source} holds {other}; {wanted}")
    for name, reason in LEADS_ELSEWHERE.items():
        if config.get(name) is not None:
            raise UserError(
                f"{key}: {source / 'config.json'} has {name}={json.dumps(config[name])[:80]}, which {reason}; take it "
                "out, or use the folder as it was released"
            )
    if (source / "adapter_config.json").exists():
        raise UserError(
            f"{key}: {source} holds adapter_config.json, which leads to weights besides the model's own; merge the "
            "adapter into the weights, or take the file away"
        )
    if not list(source.glob("*.safetensors")):
        others = sorted(path.name for path in source.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        held = f" (only {', '.join(others)}; pickled weights are not opened)" if others else ""
        raise UserError(f"{key}: {source} has no .safetensors weights{held}; {wanted}")
    for index in source.glob("*.safetensors.index.json"):
        places = _read_json(key, index, wanted).get("weight_map")
        for name in set(map(str, places.values())) if isinstance(places, dict) else {"no file"}:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{key}: {index} names {name!r}, not a .safetensors file beside it; {wanted}")
    return source, config


def _read_json(key: str, path: Path, wanted: str) -> dict[str, Any]:
    """A mapping, empty for JSON of another kind; UserError for what is no JSON."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{key}: {path} is not JSON ({error}); {wanted}") from error
    return values if isinstance(values, dict) else {}


@contextmanager
def as_user_error(message: str) -> Iterator[None]:
    """Inside, whatever the libraries raise for a folder that is not as released becomes `message: reason`."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except UserError:
        raise
    except (
        SafetensorError, StrictDataclassError, OSError, RuntimeError, ImportError, ValueError, LookupError, TypeError,
        AttributeError, ArithmeticError,
    ) as error:  # fmt: skip
        raise UserError(f"{message}: {error}; download the folder again, or give another one") from error


def load_model(key: str, model_class: Any, source: Path, dtype: torch.dtype, may_lack: tuple[str, ...] = ()) -> Any:
    """The model with every one of its weights from the folder, frozen; weights of other heads there are not its own."""
    with as_user_error(f"{key}: the weights in {source} cannot be read as {model_class.__name__}"):
        model, report = model_class.from_pretrained(
            source, use_safetensors=True, local_files_only=True, output_loading_info=True, torch_dtype=dtype
        )
    missing = sorted(name for name in report["missing_keys"] if name not in may_lack)
    if missing or report["mismatched_keys"]:
        raise UserError(
            f"{key}: the weights in {source} are not all of a {model_class.__name__}: {len(missing)} missing "
            f"({', '.join(missing[:3])}), {len(report['mismatched_keys'])} of other shapes"
        )
    return model.requires_grad_(False).eval()


def load_tokenizer(folder: Path, *, model: Path, vocab_size: int) -> tuple[Any, list[Path]]:
    """The tokenizer of a T5 model (v1.1, umT5) and the files in `folder`; `model`, its folder, knows `vocab_size`."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    if not files:
        raise UserError(f"codecs.text_weights: {folder} is missing or empty; expected T5's tokenizer (spiece.model)")

    from transformers import T5Tokenizer

    # The class itself, not AutoTokenizer: that one offers to run code which the folder names.
    with as_user_error(f"codecs.text_weights: {folder} cannot be read as T5Tokenizer"):
        tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer("", padding="max_length", max_length=1)  # fails where there is no token to pad with
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"codecs.text_weights: the tokenizer in {folder} has {len(tokenizer)} tokens, the model in {model} knows "
            f"{vocab_size}; expected the two of one release"
        )
    return tokenizer, files


def _reads_normalised(source: Path, rate_hz: int) -> bool:
    """Whether preprocessor_config.json asks for zero mean and unit variance, the default; its rate must be ours."""
    path = source / "preprocessor_config.json"
    if not path.is_file():
        return True
    settings = _read_json("codecs.tracks_weights", path, "expected the file as released")
    if settings.get("sampling_rate", rate_hz) != rate_hz:
        raise UserError(
            f"codecs.tracks_weights: {path} wants sampling_rate={settings['sampling_rate']}; "
            f"tracks are sent at {rate_hz}"
        )
    return bool(settings.get("do_normalize", True))
