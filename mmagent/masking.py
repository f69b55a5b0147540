"""What a language model is asked of plain text: the words that are hidden from it, or the word that comes next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmagent.tasks.task import IGNORED

SHOWN_SHARE = 0.1  # of the hidden tokens that stay as they are, and as many that become another word (arXiv:1810.04805)


@dataclass(frozen=True, slots=True)
class Masking:
    """Hides a share of a text's tokens (BERT, arXiv:1810.04805, section 3.1): of those asked for, eight in ten become
    the mask, one a word drawn at random, one stays. At least one token is asked for; signs of the tokenizer never."""

    mask_id: int
    ordinary: np.ndarray  # (vocabulary,) ids of words
    signs: frozenset[int]
    share: float

    @classmethod
    def of(cls, tokenizer: Any, share: float) -> Masking:
        signs = frozenset(tokenizer.all_special_ids)
        return cls(
            tokenizer.mask_token_id, np.array([i for i in range(len(tokenizer)) if i not in signs]), signs, share
        )

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Ids (tokens,) -> ids with some of them hidden (tokens,), and what stood there (tokens,), else `IGNORED`."""
        words = np.flatnonzero([id not in self.signs for id in ids.tolist()])
        shown, asked = ids.copy(), np.full_like(ids, IGNORED)
        if not len(words):
            return shown, asked
        places = rng.permutation(words)[: max(1, round(self.share * len(words)))]
        asked[places] = ids[places]
        fate = rng.random(len(places))
        shown[places[fate >= 2 * SHOWN_SHARE]] = self.mask_id
        other = places[fate < SHOWN_SHARE]
        shown[other] = rng.choice(self.ordinary, len(other))
        return shown, asked


def following(ids: np.ndarray) -> np.ndarray:
    """(tokens,): at each place the token that comes next; `IGNORED` at the last."""
    return np.append(ids[1:], IGNORED).astype(ids.dtype)
