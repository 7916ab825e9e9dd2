"""CLVP: golden scores and the released key table."""

from __future__ import annotations

import json

import pytest
import torch
from chain_models import golden_clvp
from conftest import reference_path

from tortoise_hf.models.clvp import CLVP, CLVPConfig


@pytest.fixture(scope="module")
def golden():
    return golden_clvp()


@torch.no_grad()
def test_golden_scores(golden):
    model, tensors = golden
    scores = model(tensors["in.text"], tensors["in.codes"])
    torch.testing.assert_close(scores, tensors["out.scores"], atol=1e-4, rtol=0)
    ranking = scores.argsort(descending=True).tolist()
    assert ranking == tensors["out.scores"].argsort(descending=True).tolist()


@torch.no_grad()
def test_golden_contrastive_loss(golden):
    """Text and codes of several rows: the loss that the scores of all pairs give."""
    model, tensors = golden
    text, codes = model.encode_text(tensors["in.loss_text"]), model.encode_codes(tensors["in.codes"])
    logits = text @ codes.T * model.temperature.exp()
    target = torch.arange(len(logits))
    loss = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(loss, tensors["out.loss_batch"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_score_does_not_depend_on_the_other_rows(golden):
    model, tensors = golden
    together = model(tensors["in.text"], tensors["in.codes"])
    alone = torch.cat([model(tensors["in.text"], row) for row in tensors["in.codes"].split(1)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_key_table_is_the_released_one():
    table = json.loads(reference_path("state_dict_keys/clvp2.json").read_text())
    with torch.device("meta"):
        state = CLVP(CLVPConfig()).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == {k: v["shape"] for k, v in table.items()}


@torch.no_grad()
def test_saved_and_loaded_scores_the_same(golden, tmp_path):
    model, tensors = golden
    model.save_pretrained(tmp_path)
    again = CLVP.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tensors["in.text"], tensors["in.codes"]), model(tensors["in.text"], tensors["in.codes"]))
