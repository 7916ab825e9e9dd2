"""Sampling codes: golden greedy codes, step logits and probabilities; independence of batches; clean-up."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GOLDEN, golden_gpt
from safetensors.torch import load_file
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tortoise_hf.generation import (
    CachedGPT,
    SamplingConfig,
    candidates,
    clean_codes,
    draw,
    generate_codes,
    num_spoken,
    penalize,
)


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "gpt.safetensors")


@pytest.fixture(scope="module")
def model():
    return golden_gpt()


def prompt_of(tensors, row):
    """Text ids of a golden row with one STOP, and its latent."""
    length = int(tensors["in.text_lengths"][row])
    text_ids = torch.nn.functional.pad(tensors["in.text"][row, :length], (0, 1))
    return text_ids, tensors["out.ref.cond_latent"][row : row + 1]


def begin(model, texts, latents, num_rows=1):
    """A decoder that has read prompts, with so many rows of each, and their states, one row behind the other."""
    decoder = CachedGPT(model, len(texts) * num_rows)
    prompts = decoder.read(texts, latents)
    for prompt in prompts:
        decoder.join(prompt, num_rows)
    return decoder, [torch.stack([prompt.state for prompt in prompts for _ in range(num_rows)])]


def seen_in(ids, vocabulary):
    return torch.zeros(len(ids), vocabulary, dtype=torch.bool).scatter(1, ids, True)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("penalty", [1, 2])
def test_golden_greedy_codes(model, tensors, row, penalty):
    text_ids, latent = prompt_of(tensors, row)
    expected = tensors[f"out.greedy.rp{penalty}.b{row}"]
    config = SamplingConfig(temperature=0, repetition_penalty=penalty, max_codes=expected.shape[1])
    assert generate_codes(model, [text_ids], latent, config=config)[0].tolist() == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
def test_golden_step_logits(model, tensors, row):
    text_ids, latent = prompt_of(tensors, row)
    expected, codes = tensors[f"out.greedy.step_logits.b{row}"], tensors[f"out.greedy.rp1.b{row}"]
    decoder, states = begin(model, [text_ids], latent)
    states += [decoder.code(codes[:, step], torch.tensor([step + 1])) for step in range(expected.shape[1] - 1)]
    torch.testing.assert_close(model.mel_head(torch.stack(states, 1)), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_cached_states_are_those_of_the_whole_row(model, tensors):
    """Far enough that the cache has to grow; the states equal the latents that the diffusion model gets."""
    text_ids, latent = prompt_of(tensors, 0)
    codes = torch.randint(0, 256, (3, 60), generator=torch.Generator().manual_seed(0))
    decoder, states = begin(model, [text_ids], latent, num_rows=3)
    states += [decoder.code(codes[:, step], torch.tensor([step + 1] * 3)) for step in range(59)]
    whole = model.latents(text_ids.unsqueeze(0), codes, latent)
    torch.testing.assert_close(torch.stack(states, 1), whole, atol=1e-4, rtol=0)


@torch.no_grad()
def test_golden_latents_and_that_codes_further_on_do_not_change_them(model, tensors):
    codes, latent, text = (tensors[f"in.api.{name}"] for name in ("codes", "cond_latent", "text_tokens"))
    latents = model.latents(text, codes, latent)
    torch.testing.assert_close(latents, tensors["out.api.latents"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.latents(text, codes[:, :7], latent), latents[:, :7], atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix, temperature, top_p", [("", 0.8, 0.8), ("_t1.5_p0.99", 1.5, 0.99)])
def test_golden_probabilities(suffix, temperature, top_p):
    golden = load_file(GOLDEN / "sampling.safetensors")
    logits, ids = golden["in.logits"], golden["in.input_ids"]
    penalized = penalize(logits, seen_in(ids, logits.shape[1]), 2.0)
    probabilities, codes = candidates(penalized, temperature, 50, top_p)
    found = torch.zeros_like(logits).scatter(1, codes, probabilities)
    torch.testing.assert_close(found, golden[f"out.probs{suffix}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_k, top_p", [(50, 0.8), (5, 1.0), (0, 0.3), (1, 0.01), (0, 1.0)])
def test_probabilities_are_transformers_own(top_k, top_p):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(20, 300, generator=generator) * 4
    ids = torch.randint(0, 300, (20, 40), generator=generator)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7), TemperatureLogitsWarper(0.6)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    expected = processors(ids, logits.clone()).softmax(-1)
    probabilities, codes = candidates(penalize(logits, seen_in(ids, 300), 1.7), 0.6, top_k, top_p)
    torch.testing.assert_close(torch.zeros_like(logits).scatter(1, codes, probabilities), expected, atol=1e-6, rtol=0)


def test_draws_follow_the_probabilities():
    generator = torch.Generator().manual_seed(2)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]])
    config = SamplingConfig(temperature=1.0, top_k=4, top_p=0.95)
    uniform = torch.rand(20_000, generator=generator)
    drawn = draw(logits.expand(len(uniform), -1), config, uniform)
    expected = torch.tensor([2.0, 1.0, 0.0]).exp()  # the fourth lies in the last 5 %
    found = torch.bincount(drawn, minlength=5) / len(uniform)
    torch.testing.assert_close(found, torch.cat([expected / expected.sum(), torch.zeros(2)]), atol=0.01, rtol=0)
    extremes = draw(logits.expand(2, -1), config, torch.tensor([0.0, 1.0 - 2**-24]))
    assert extremes.tolist() == [0, 2]


@pytest.fixture
def willing(model, tensors):
    """A model that often ends: rows of many lengths."""
    model = golden_gpt()
    with torch.no_grad():
        model.mel_head.bias[model.config.stop_mel_id] += 1.5
        model.mel_head.bias[model.config.start_mel_id] += 50  # would be drawn all the time if it could
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_batches_change_nothing_and_lose_nobody(willing, tensors, batch_size):
    text_ids, latent = prompt_of(tensors, 0)
    config = SamplingConfig(temperature=1.5, top_p=1.0, max_codes=50)
    progress = []
    all_at_once = generate_codes(willing, [text_ids], latent, 16, config, seed=3)
    codes = generate_codes(
        willing, [text_ids], latent, 16, config, seed=3, batch_size=batch_size, progress=progress.append
    )
    assert codes.shape == (1, 16, 50)
    assert torch.equal(codes, all_at_once)
    assert sum(progress) == 16
    lengths = (codes != willing.config.stop_mel_id).sum(-1)
    assert len(lengths.unique()) > 4  # rows really left the batch one after the other
    assert len(codes[0].unique(dim=0)) > 10
    assert torch.equal(generate_codes(willing, [text_ids], latent, 5, config, seed=3), all_at_once[:, :5])
    assert not torch.equal(generate_codes(willing, [text_ids], latent, 16, config, seed=4), all_at_once)


@pytest.fixture
def several(tensors):
    """Texts of many lengths, each with a latent of its own."""
    generator = torch.Generator().manual_seed(5)
    lengths = [9, 2, 23, 5, 14, 31, 3]
    texts = [torch.randint(1, 40, (length,), generator=generator) for length in lengths]
    return [torch.nn.functional.pad(text, (0, 1)) for text in texts], torch.randn(7, 64, generator=generator)


@pytest.mark.parametrize("num_samples, batch_size", [(1, None), (3, 5)])
def test_texts_in_a_batch_say_what_they_say_alone(willing, several, num_samples, batch_size):
    texts, latents = several
    config = SamplingConfig(temperature=1.5, top_p=1.0, max_codes=50)
    together = generate_codes(willing, texts, latents, num_samples, config, seed=3, batch_size=batch_size)
    assert together.shape == (7, num_samples, 50)
    for i in (0, 2, 6):
        alone = generate_codes(willing, [texts[i]], latents[i : i + 1], num_samples, config, seed=3)
        assert torch.equal(alone[0], together[i])
    shared = generate_codes(willing, texts, latents[:1], num_samples, config, seed=3)
    assert torch.equal(shared[0], together[0])
    assert not torch.equal(shared[1:], together[1:])


@torch.no_grad()
def test_states_depend_on_no_neighbour(model, several):
    """Rows of many lengths, some leaving and others taking their place, have the states of the whole row by itself."""
    texts, latents = several
    codes = torch.randint(0, 256, (7, 60), generator=torch.Generator().manual_seed(0))
    whole = [
        model.latents(text.unsqueeze(0), row.unsqueeze(0), latent.unsqueeze(0))[0]
        for text, row, latent in zip(texts, codes, latents, strict=True)
    ]
    decoder = CachedGPT(model, 4)
    prompts = decoder.read(texts, latents)
    rows, waiting, steps = [], list(range(7)), [0] * 7
    until = [10, 59, 3, 30, 59, 20, 45]
    while rows or waiting:
        while waiting and len(rows) < 4:
            rows.append(waiting.pop(0))
            decoder.join(prompts[rows[-1]], 1)
            torch.testing.assert_close(prompts[rows[-1]].state, whole[rows[-1]][0], atol=1e-4, rtol=0)
        for row in rows:
            steps[row] += 1
        now = torch.tensor([steps[row] for row in rows])
        states = decoder.code(codes[rows, now - 1], now)
        for row, state in zip(rows, states, strict=True):
            torch.testing.assert_close(state, whole[row][steps[row]], atol=1e-4, rtol=0)
        order = decoder.leave([place for place, row in enumerate(rows) if steps[row] == until[row]])
        rows = [rows[place] for place in order]


def test_start_never_comes_and_after_stop_comes_only_stop(willing, tensors):
    text_ids, latent = prompt_of(tensors, 1)
    config = SamplingConfig(temperature=2.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_codes=50)
    codes = generate_codes(willing, [text_ids], latent, 12, config)[0]
    assert not (codes == willing.config.start_mel_id).any()
    stopped = (codes == willing.config.stop_mel_id).cumsum(1) > 0
    assert (codes[stopped] == willing.config.stop_mel_id).all()
    assert stopped.any()
    assert not stopped.all()


def test_what_does_not_fit_is_refused(model):
    latent = torch.zeros(1, 64)
    with pytest.raises(ValueError, match="text ids"):
        generate_codes(model, [torch.zeros(41, dtype=torch.int64)], latent)
    with pytest.raises(ValueError, match="max_codes"):
        generate_codes(model, [torch.zeros(4, dtype=torch.int64)], latent, config=SamplingConfig(max_codes=65))


def test_golden_clean_up_and_trim():
    golden = json.loads((GOLDEN / "fix_autoregressive_output.json").read_text())
    for row in golden["rows"]:
        codes = torch.tensor([row["codes"]])
        cleaned = clean_codes(codes, golden["stop_token"])
        assert cleaned.tolist() == [row["fixed"]]
        assert num_spoken(cleaned[0]) == row["latent_trim_len"]
        assert codes.tolist() == [row["codes"]]
    together = clean_codes(torch.tensor([row["codes"] for row in golden["rows"][:4]]), golden["stop_token"])
    assert together.tolist() == [row["fixed"] for row in golden["rows"][:4]]
