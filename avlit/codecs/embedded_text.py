"""The embedded text encoder: each word is its own fixed random vector, so any text has features without weights."""

import hashlib
import math
import re

import numpy as np
import torch
from torch import Tensor

WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
"""A run of letters and digits with its apostrophes, or one mark of punctuation."""

POSITION_SHARE = 0.25
"""Standard deviation of the position signal beside a word's 1: enough for a linear layer to read it, and two uses of
a word stay alike (cosine above 0.9)."""


class EmbeddedTextEncoder:
    """Words to unit-variance vectors, the same in every process; words never seen before need no vocabulary.

    Case is dropped. Text beyond `max_tokens` words and marks is cut at the end, as T5's 226 tokens are.
    """

    identity = "embedded-text-1"
    dim = 64
    max_tokens = 48

    def __init__(self) -> None:
        self._words: dict[str, Tensor] = {}
        places = torch.arange(self.max_tokens, dtype=torch.float64)[:, None]
        rates = torch.exp(-math.log(100.0) * torch.arange(self.dim // 2, dtype=torch.float64) / (self.dim // 2 - 1))
        waves = torch.cat([torch.sin(places * rates), torch.cos(places * rates)], dim=1) * math.sqrt(2)
        self._positions = (POSITION_SHARE * waves).float()  # [max_tokens, D]

    def encode(self, text: str) -> Tensor:
        """A prompt -> [L, 64], one row a word or mark, at most 48; no rows for an empty prompt."""
        words = WORD.findall(text.lower())[: self.max_tokens]
        if not words:
            return torch.zeros(0, self.dim)
        return torch.stack([self._vector(word) for word in words]) + self._positions[: len(words)]

    def _vector(self, word: str) -> Tensor:
        vector = self._words.get(word)
        if vector is None:
            key = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=16).digest(), "little")
            numbers = np.random.Generator(np.random.Philox(key=key)).standard_normal(self.dim)
            # exactly zero mean and unit variance: no word is louder than another by chance
            vector = torch.from_numpy((numbers - numbers.mean()) / numbers.std()).float()
            self._words[word] = vector
        return vector
