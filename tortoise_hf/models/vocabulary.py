"""Weights made with one tokenizer, used with another: which text row each token of the new one starts from.

A token that both know keeps its row. A new one starts as the mean of the rows of the pieces the old tokenizer would cut
it into, so that "the" learned from "th" and "e" means something from the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tortoise_hf.errors import UserError

_TEXT_TENSORS = ("text_embedding.weight", "text_head.weight", "text_head.bias")
_UNK = "[UNK]"


@dataclass(frozen=True)
class VocabularyMapping:
    """Where the text rows of resized weights come from.

    `rows` gives, for each new id, the old rows whose mean it starts from; an empty tuple stands for the mean of all old
    tokens. START isn't an id of the tokenizer: its row is always the last one and is kept.
    """

    num_text_tokens: int
    rows: tuple[tuple[int, ...], ...]
    kept: tuple[str, ...]
    composed: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def is_identity(self) -> bool:
        """Whether every token has the id it had before."""
        return not self.dropped and all(row == (index,) for index, row in enumerate(self.rows))

    def summary(self) -> str:
        """One line for the user."""
        return (
            f"{len(self.kept)} tokens keep their rows, {len(self.composed)} start from their pieces, "
            f"{len(self.fresh)} are new{_some(self.fresh)}, {len(self.dropped)} are gone{_some(self.dropped)}; "
            f"{self.num_text_tokens + 1} text rows"
        )


def _some(tokens: tuple[str, ...]) -> str:
    return f" ({' '.join(tokens[:10])}{' …' if len(tokens) > 10 else ''})" if tokens else ""


def map_vocabulary(old_path: str | Path, new_path: str | Path, old_num_text_tokens: int) -> VocabularyMapping:
    """Work out how weights made with one tokenizer.json serve another.

    Args:
        old_path: tokenizer the weights were made with.
        new_path: tokenizer to train with.
        old_num_text_tokens: text ids the weights hold rows for, START not counted. The new table never gets smaller,
            because TorToiSe's programs insist on 255 + 1 rows; rows beyond the new vocabulary stay unused.

    Raises: UserError: if the old tokenizer has more ids than the weights have rows.
    """
    old, new = Tokenizer.from_file(str(old_path)), Tokenizer.from_file(str(new_path))
    old_ids, new_ids = old.get_vocab(), new.get_vocab()
    if max(old_ids.values()) >= old_num_text_tokens:
        raise UserError(
            f"{old_path} has ids up to {max(old_ids.values())}, but the weights hold {old_num_text_tokens} text rows "
            f"besides START; the weights were made with another tokenizer, put that one beside them."
        )
    num_text_tokens = max(old_num_text_tokens, max(new_ids.values()) + 1)
    rows: list[tuple[int, ...]] = [()] * num_text_tokens
    kept, composed, fresh = [], [], []
    for token, index in sorted(new_ids.items(), key=lambda item: item[1]):
        if token in old_ids:
            kept.append(token)
            rows[index] = (old_ids[token],)
            continue
        pieces = tuple(piece for piece in old.encode(token).ids if piece != old_ids.get(_UNK))
        rows[index] = pieces
        (composed if pieces else fresh).append(token)
    dropped = tuple(token for token in sorted(old_ids, key=old_ids.__getitem__) if token not in new_ids)
    return VocabularyMapping(num_text_tokens, tuple(rows), tuple(kept), tuple(composed), tuple(fresh), dropped)


def resize_text_rows(weights: Mapping[str, torch.Tensor], mapping: VocabularyMapping) -> dict[str, torch.Tensor]:
    """The weights with text embedding and text head rearranged; everything else is the same tensor as before.

    Args:
        weights: under the published names, (old_num_text_tokens + 1, …) text rows.
        mapping: from `map_vocabulary`.
    """
    resized = dict(weights)
    for name in _TEXT_TENSORS:
        old = weights[name].double()  # rounded once, so that every processor finds the same mean
        tokens, start = old[:-1], old[-1]
        mean = tokens.mean(0)
        new = [tokens[list(rows)].mean(0) if rows else mean for rows in mapping.rows]
        resized[name] = torch.stack([*new, start]).float()
    return resized
