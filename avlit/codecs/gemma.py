"""Gemma 3 as LTX-2 reads it, from a local diffusers folder: prompts to features, and those to the text of each stream.

What a shard holds of a prompt are its own tokens' features, [L, D] of the connectors' shared projection. A model gives
those and their lengths to `TextConnectors`, frozen like the backbone, and its video and audio streams attend to the two
texts that it makes. Shards could hold these texts, but they are 2 x 1024 tokens for the shortest prompt, since learnt
registers stand where there is no token: 15.7 MB a caption at LTX-2's size, against 0.8 MB for 100 tokens.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avlit.codecs.pretrained import (
    LEADS_ELSEWHERE,
    as_user_error,
    fingerprint,
    load_model,
    model_files,
    model_folder,
)
from avlit.errors import UserError

TEXT_TOKENS = 1024
"""Tokens that LTX-2 reads a prompt as, registers included; longer prompts are cut."""

KEY = "codecs.text_weights"


class GemmaEncoder:
    """transformers' Gemma3ForConditionalGeneration from `folder/text_encoder` and `folder/tokenizer`.

    All its hidden states, the embeddings' among them, are normalised by layer over the prompt's tokens and projected to
    D by the LTX2TextConnectors of `folder/connectors`, as LTX2Pipeline does. Prompts are encoded without padding: the
    pipeline pads to the left and masks it, which changes nothing but the last digits.
    """

    max_tokens = TEXT_TOKENS

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._source, raw = model_folder(
            KEY, folder / "text_encoder", "architectures", ("Gemma3ForConditionalGeneration",)
        )
        _check_parts(self._source / "config.json", raw)
        self._connectors_source, connectors = _connectors_folder(KEY, folder)

        from transformers import Gemma3Config

        with as_user_error(f"{KEY}: {self._source / 'config.json'} cannot be read as Gemma3Config"):
            config: Any = Gemma3Config.from_pretrained(self._source, local_files_only=True).text_config
            made = (int(config.hidden_size), int(config.num_hidden_layers) + 1)
        expected = (connectors.get("caption_channels"), connectors.get("text_proj_in_factor"))
        if made != expected:
            raise UserError(
                f"{KEY}: the text encoder in {self._source} has {made[1]} hidden states of {made[0]}, the connectors "
                f"in {self._connectors_source} read {expected[1]} of {expected[0]}; expected the two of one release"
            )
        self._tokenizer, words = _load_tokenizer(folder / "tokenizer", model=self._source, vocab_size=config.vocab_size)
        self.dim: int = made[0]
        self._device, self._dtype = device, dtype
        files = [*model_files(self._source), *words, *model_files(self._connectors_source)]
        self.identity = f"Gemma3-{self.max_tokens}-{fingerprint(files)}"

    @cached_property
    def _model(self) -> Any:
        from transformers import Gemma3ForConditionalGeneration

        unused = ("lm_head.weight",)  # no word is predicted
        model = load_model(KEY, Gemma3ForConditionalGeneration, self._source, self._dtype, unused)
        return model.model.to(self._device)

    @cached_property
    def _projection(self) -> nn.Module:
        return _load_connectors(KEY, self._connectors_source, self._dtype).text_proj_in.to(self._device)

    @torch.no_grad()
    def encode(self, text: str) -> Tensor:
        """A prompt -> [L, D] on the CPU, its tokens and the beginning's, L from 1 (an empty prompt) to 1024."""
        from diffusers.pipelines.ltx2.connectors import per_layer_masked_mean_norm

        tokens = self._tokenizer(text.strip(), max_length=self.max_tokens, truncation=True, return_tensors="pt")
        device = self._model.device
        states = self._model(input_ids=tokens.input_ids.to(device), output_hidden_states=True).hidden_states
        stacked = torch.stack(states, dim=-1)  # [1, L, D, K]
        lengths = torch.tensor([stacked.shape[1]], device=device)
        features = self._projection(per_layer_masked_mean_norm(stacked, lengths, device))  # [1, L, D]
        return features[0].float().cpu()


class TextConnectors(nn.Module):
    """The two connectors of diffusers' LTX2TextConnectors: from the features in a shard to what each stream attends to.

    Frozen, and without the projection, which the features have passed.
    """

    def __init__(self, connectors: Any) -> None:
        super().__init__()
        self.video, self.audio = connectors.video_connector, connectors.audio_connector
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TextConnectors":
        """Stays in evaluation: it is never trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, text: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """text [B, L, D], of which each clip's first `lengths` are its own -> texts [B, 1024, D] of video and of audio.

        They are in the connectors' own precision, and all their tokens are attended to: no mask goes with them. Raises
        ValueError for more than 1024 tokens, or for a clip without any.
        """
        batch, num_tokens, dim = text.shape
        if num_tokens > TEXT_TOKENS or len(lengths) != batch or not all(0 < length <= num_tokens for length in lengths):
            raise ValueError(
                f"text of shape {tuple(text.shape)} with {list(lengths)} tokens: LTX-2 reads [B, L, D] of 1 to "
                f"{TEXT_TOKENS} tokens a clip"
            )
        registers = self.video.learnable_registers
        padded = torch.zeros(batch, TEXT_TOKENS, dim, device=registers.device, dtype=registers.dtype)
        padded[:, :num_tokens] = text.to(padded)
        places = torch.arange(TEXT_TOKENS, device=padded.device)
        is_padding = places >= torch.tensor(tuple(lengths), device=padded.device)[:, None]  # [B, 1024]
        mask = is_padding[:, None, None].to(padded.dtype) * -torch.finfo(padded.dtype).max  # as LTX2TextConnectors'
        return self.video(padded, mask)[0], self.audio(padded, mask)[0]


def load_text_connectors(
    folder: Path, *, key: str = KEY, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> TextConnectors:
    """Those in `folder/connectors` of a released LTX-2; `key` is the setting that a UserError blames.

    Where torch makes tensors on the meta device, they are LTX-2's without weights, and no folder is read.
    """
    if torch.get_default_device().type == "meta":
        from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

        return TextConnectors(LTX2TextConnectors()).to(dtype)
    source, _ = _connectors_folder(key, folder)
    return TextConnectors(_load_connectors(key, source, dtype)).to(device)


def _connectors_folder(key: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    source, config = model_folder(key, folder / "connectors", "_class_name", ("LTX2TextConnectors",))
    if config.get("per_modality_projections"):
        raise UserError(f"{key}: {source} has a projection for each modality, as LTX-2.3; expected LTX-2's shared one")
    for name in ("video_connector_num_learnable_registers", "audio_connector_num_learnable_registers"):
        count = config.get(name)
        if not isinstance(count, int) or count < 1 or TEXT_TOKENS % count:
            raise UserError(
                f"{key}: {source / 'config.json'} has {name}={count}; expected a divisor of {TEXT_TOKENS} tokens"
            )
    return source, config


def _load_connectors(key: str, source: Path, dtype: torch.dtype) -> Any:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    return load_model(key, LTX2TextConnectors, source, dtype)


def _check_parts(path: Path, config: dict[str, Any]) -> None:
    """As `model_folder` does for a config's own keys: its parts may not lead to code or weights elsewhere either."""
    for part in ("text_config", "vision_config"):
        for name, reason in LEADS_ELSEWHERE.items():
            if isinstance(config.get(part), dict) and config[part].get(name) is not None:
                raise UserError(
                    f"{KEY}: {path} has {part}.{name}={json.dumps(config[part][name])[:80]}, which {reason}; take it "
                    "out, or use the folder as it was released"
                )


def _load_tokenizer(folder: Path, *, model: Path, vocab_size: int) -> tuple[Any, list[Path]]:
    """Gemma's tokenizer and the files in `folder`; `model`, its folder, knows `vocab_size`."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    if not any(path.name == "tokenizer.json" for path in files):
        raise UserError(f"{KEY}: {folder} has no tokenizer.json; expected Gemma's tokenizer")

    from transformers import GemmaTokenizer

    with as_user_error(f"{KEY}: {folder} cannot be read as GemmaTokenizer"):
        tokenizer = GemmaTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if tokenizer("").input_ids != [tokenizer.bos_token_id]:
            raise ValueError(f"an empty text has the tokens {tokenizer('').input_ids}, not the beginning's alone")
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{KEY}: the tokenizer in {folder} has {len(tokenizer)} tokens, the model in {model} knows {vocab_size}; "
            "expected the two of one release"
        )
    return tokenizer, files
