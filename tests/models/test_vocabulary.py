"""Another tokenizer: which row each token starts from."""

from __future__ import annotations

import pytest
import torch

from tortoise_hf.errors import UserError
from tortoise_hf.models.vocabulary import map_vocabulary, resize_text_rows
from tortoise_hf.text import TextTokenizer, train_tokenizer

OLD_TEXTS = ["the thin thing then there", "when where what which", "sing song thing ring"] * 5
NEW_TEXTS = ["station nation ration the", "motion notion potion then", "sing song sung ring"] * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(OLD_TEXTS, 60).save(folder / "old.json")
    train_tokenizer(NEW_TEXTS, 70).save(folder / "new.json")
    train_tokenizer(NEW_TEXTS, 45).save(folder / "small.json")
    return folder


def text_weights(num_text_tokens, width=8):
    generator = torch.Generator().manual_seed(1)
    return {
        "text_embedding.weight": torch.randn(num_text_tokens + 1, width, generator=generator),
        "text_head.weight": torch.randn(num_text_tokens + 1, width, generator=generator),
        "text_head.bias": torch.randn(num_text_tokens + 1, generator=generator),
        "final_norm.bias": torch.randn(width, generator=generator),
    }


def vocabulary(path):
    tokenizer = TextTokenizer.from_file(path)._tokenizer
    return tokenizer.get_vocab(), tokenizer


@pytest.mark.parametrize("new_name", ["new.json", "small.json"])
@pytest.mark.parametrize("spare", [0, 20])
def test_known_tokens_keep_their_rows_and_new_ones_start_from_their_pieces(folder, new_name, spare):
    old_ids, old = vocabulary(folder / "old.json")
    new_ids, _ = vocabulary(folder / new_name)
    rows = len(old_ids) + spare
    weights = text_weights(rows)
    mapping = map_vocabulary(folder / "old.json", folder / new_name, rows)
    resized = resize_text_rows(weights, mapping)
    shared = old_ids.keys() & new_ids.keys()
    assert len(shared) >= 40
    for name in ("text_embedding.weight", "text_head.weight", "text_head.bias"):
        assert len(resized[name]) == max(rows, len(new_ids)) + 1
        for token in shared:
            assert torch.equal(resized[name][new_ids[token]], weights[name][old_ids[token]])
        for token in new_ids.keys() - old_ids.keys():
            pieces = old.encode(token).ids
            assert len(pieces) > 1
            torch.testing.assert_close(resized[name][new_ids[token]], weights[name][pieces].mean(0))
        assert torch.equal(resized[name][-1], weights[name][-1])  # START
    assert resized["final_norm.bias"] is weights["final_norm.bias"]
    assert set(mapping.kept) == shared
    assert set(mapping.composed) == new_ids.keys() - old_ids.keys()
    assert set(mapping.dropped) == old_ids.keys() - new_ids.keys()


def test_same_vocabulary_changes_nothing(folder):
    old_ids, _ = vocabulary(folder / "old.json")
    mapping = map_vocabulary(folder / "old.json", folder / "old.json", len(old_ids))
    assert mapping.is_identity
    weights = text_weights(len(old_ids))
    assert all(torch.equal(tensor, weights[key]) for key, tensor in resize_text_rows(weights, mapping).items())
    assert not map_vocabulary(folder / "old.json", folder / "new.json", len(old_ids)).is_identity


def test_character_the_old_tokenizer_never_saw_starts_from_the_mean(folder, tmp_path):
    definition = (folder / "old.json").read_text(encoding="utf-8")
    ids, _ = vocabulary(folder / "old.json")
    (tmp_path / "umlaut.json").write_text(definition.replace('"?":', '"ü":'), encoding="utf-8")
    mapping = map_vocabulary(folder / "old.json", tmp_path / "umlaut.json", len(ids))
    assert mapping.fresh == ("ü",)
    assert mapping.dropped == ("?",)
    assert not mapping.is_identity
    weights = text_weights(len(ids))
    row = resize_text_rows(weights, mapping)["text_embedding.weight"][ids["?"]]
    torch.testing.assert_close(row, weights["text_embedding.weight"][:-1].mean(0))
    assert "ü" in mapping.summary()


def test_tokenizer_that_cannot_belong_to_the_weights_is_refused(folder):
    ids, _ = vocabulary(folder / "old.json")
    with pytest.raises(UserError, match="another tokenizer"):
        map_vocabulary(folder / "old.json", folder / "new.json", len(ids) - 1)
