"""Packed micro-batches: the losses and gradients of padded ones, whatever the rows, their order and the kernel."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden_gpt
from torch.nn.utils.rnn import pad_sequence

from tortoise_hf.config import LoraConfig
from tortoise_hf.data.collate import IGNORE_INDEX, Batch, Collator, Example
from tortoise_hf.lora import add_adapter
from tortoise_hf.loss import gpt_loss
from tortoise_hf.machine import set_gradient_checkpointing
from tortoise_hf.models import attention, cross_entropy
from tortoise_hf.models.attention import PACKED_SDPA

ROWS = {
    "of unequal length": [(9, 22), (3, 30), (12, 5), (1, 1)],
    "one": [(9, 22)],
    "of equal length, some only in all": [(9, 22), (9, 22), (5, 26), (9, 23), (9, 22)],
    "that fill the position tables": [(40, 60), (39, 60), (2, 60)],
    "that share conditioning": [(9, 22), (3, 30), (12, 5)],
}
SHARED = {"that share conditioning": [7, 8, 7]}


def make_batch(rows, shared=None, seed=0, **settings) -> Batch:
    """Clips of so many text ids and mel codes each, of the golden model's vocabulary."""
    rng = np.random.default_rng(seed)
    examples = [
        Example(
            text_ids=rng.integers(2, 255, num_text),
            mel_codes=rng.integers(0, 256, num_codes),
            conditioning_mel=rng.standard_normal((2, 80, 20), dtype=np.float32),
            index=index,
            conditioning_of=None if shared is None else shared[index],
        )
        for index, (num_text, num_codes) in enumerate(rows)
    ]
    return Collator.for_model(golden_gpt().config, **settings)(examples)


def reordered(batch: Batch, order: list[int]) -> list[Example]:
    """The examples a batch was made of, in another order."""
    return [
        Example(
            text_ids=batch.text_targets[row][batch.text_targets[row] != IGNORE_INDEX][:-1].numpy(),
            mel_codes=batch.mel_targets[row][batch.mel_targets[row] != IGNORE_INDEX][:-1].numpy(),
            conditioning_mel=batch.conditioning_mel[row].numpy(),
            index=row,
        )
        for row in order
    ]


def padded_loss(model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sums over padded rows, written out: all positions are computed, and heads asked everywhere."""
    heard = batch.conditioning_rows if batch.conditioning_rows is not None else torch.arange(len(batch.indices))
    latents = model.encode_conditioning(batch.conditioning_mel)[heard]
    text = model.text_embedding(batch.text_inputs) + model.text_pos_embedding(batch.text_inputs)
    mel = model.mel_embedding(batch.mel_inputs) + model.mel_pos_embedding(batch.mel_inputs)
    sizes = list(zip(batch.text_lengths.tolist(), batch.mel_lengths.tolist(), strict=True))
    rows = [torch.cat([latents[row, None], text[row, :t], mel[row, :m]]) for row, (t, m) in enumerate(sizes)]
    hidden = model.gpt(inputs_embeds=pad_sequence(rows, batch_first=True), use_cache=False).last_hidden_state
    hidden = model.final_norm(hidden)
    text_sum = mel_sum = 0
    for row, (t, m) in enumerate(sizes):
        text_logits, mel_logits = model.text_head(hidden[row, 1 : 1 + t]), model.mel_head(hidden[row, 1 + t :][:m])
        text_sum += F.cross_entropy(text_logits, batch.text_targets[row, :t], reduction="sum")
        mel_sum += F.cross_entropy(mel_logits, batch.mel_targets[row, :m], reduction="sum")
    return text_sum, mel_sum


def packed_loss(model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as training takes them."""
    sums = gpt_loss(model, batch)
    return sums.text, sums.mel


def passed(loss, model, batch):
    """Losses per target, and gradients by name."""
    model.zero_grad()
    text, mel = loss(model, batch)
    (text / batch.num_text_targets + mel / batch.num_mel_targets).backward()
    losses = [float(text.detach()) / batch.num_text_targets, float(mel.detach()) / batch.num_mel_targets]
    return losses, {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


def assert_same(found, expected, loss=1e-5, gradient=1e-4):
    """Losses within `loss`, every tensor's gradient within `gradient` of its size."""
    assert found[0] == pytest.approx(expected[0], abs=loss, rel=0)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        difference = (found[1][name] - value).norm()
        assert difference <= gradient * value.norm().clamp(min=1e-7), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ROWS)
def test_packed_is_padded(kind, training):
    model, batch = golden_gpt().train(training), make_batch(ROWS[kind], SHARED.get(kind))
    assert (batch.conditioning_rows is not None) == (kind in SHARED)
    assert_same(passed(packed_loss, model, batch), passed(padded_loss, model, batch))


def test_reference_padding_is_computed_as_rows_of_one_length():
    model, batch = golden_gpt(), make_batch(ROWS["of unequal length"], padding="stop")
    assert len(batch.packing.runs) == 1
    output = model(batch.text_inputs, batch.mel_inputs, conditioning_mel=batch.conditioning_mel)
    sums = gpt_loss(model, batch)
    for found, logits, targets in (
        (sums.text, output.text_logits, batch.text_targets),
        (sums.mel, output.mel_logits, batch.mel_targets),
    ):
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_nothing_as_wide_as_the_model_is_padded():
    model, batch = golden_gpt(), make_batch(ROWS["of unequal length"])
    real = int((1 + batch.text_lengths + batch.mel_lengths).sum())
    assert batch.packing.num_positions == real
    seen = {}
    for name in ("text_embedding", "mel_embedding", "gpt.h.0.mlp", "text_head", "mel_head"):
        hook = lambda module, inputs, output, name=name: seen.update({name: output.shape[:-1].numel()})  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    gpt_loss(model, batch)
    expected = {"text_embedding": int(batch.text_lengths.sum()), "mel_embedding": int(batch.mel_lengths.sum())}
    expected |= {"gpt.h.0.mlp": real, "text_head": batch.num_text_targets, "mel_head": batch.num_mel_targets}
    assert seen == expected
    assert batch.num_text_targets < int(batch.text_lengths.sum()), "the STOP that asks for nothing isn't asked"


def test_order_and_neighbours_have_no_say():
    model, batch = golden_gpt(), make_batch(ROWS["of unequal length"])
    expected = passed(packed_loss, model, batch)
    collate = Collator.for_model(model.config)
    for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
        assert_same(passed(packed_loss, model, collate(reordered(batch, order))), expected)
    alone = [passed(packed_loss, model, collate(reordered(batch, [row]))) for row in range(4)]
    counts = [collate(reordered(batch, [row])).num_mel_targets for row in range(4)]
    mel = sum(losses[1] * count for (losses, _), count in zip(alone, counts, strict=True)) / sum(counts)
    assert mel == pytest.approx(expected[0][1], abs=1e-5)


def test_other_ids_of_one_row_move_only_its_own_loss():
    model, batch = golden_gpt(), make_batch([(9, 22), (3, 30)])
    changed = dataclasses.replace(batch, text_inputs=batch.text_inputs.clone(), mel_inputs=batch.mel_inputs.clone())
    changed.text_inputs[0, 3], changed.mel_inputs[0, 4] = 17, 18
    only_second = [batch.text_targets.clone(), batch.mel_targets.clone()]
    for targets in only_second:
        targets[0] = IGNORE_INDEX
    losses = []
    for one in (batch, changed):
        both = gpt_loss(model, one).mel
        packing = Collator.for_model(model.config)(reordered(batch, [1])).packing
        assert packing.num_positions < one.packing.num_positions
        keep = one.packing.mel_targets >= batch.mel_targets.shape[1]
        second = copy.copy(one.packing)
        second.mel_targets, second.mel_askers = second.mel_targets[keep], second.mel_askers[keep]
        losses.append((float(both), float(gpt_loss(model, dataclasses.replace(one, packing=second)).mel)))
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-6)
    assert abs(losses[0][0] - losses[1][0]) > 0.1


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputed_activations_give_the_same_gradients(dropout):
    model, batch, found = golden_gpt(dropout).train(), make_batch(ROWS["of unequal length"]), []
    for recomputing in (False, True):
        set_gradient_checkpointing(model, recomputing)
        torch.manual_seed(3)
        found.append(passed(packed_loss, model, batch))
    assert_same(found[1], found[0], 1e-9, 1e-6)


def test_an_adapter_trains_the_same(monkeypatch):
    """Wider layers everywhere, and the heads' logits in pieces."""
    model = golden_gpt()
    add_adapter(model, LoraConfig(rank=2, conditioning_encoder=True, embeddings=True, heads=True, dropout=0.0), seed=0)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.copy_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 10 * 258)
    batch = make_batch(ROWS["of unequal length"])
    assert_same(passed(packed_loss, model.train(), batch), passed(padded_loss, model, batch))


def test_half_precision_comes_close():
    model, batch = golden_gpt(), make_batch(ROWS["of unequal length"])
    expected = passed(packed_loss, model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = passed(packed_loss, model, batch)
    assert found[0] != expected[0]
    assert_same(found, expected, 0.05, 0.1)


class TestOnAGpu:
    """The ways that are taken there, on tensors that say they are there."""

    @pytest.fixture
    def pretend(self, monkeypatch):
        """Has attention take the GPU's way, with the kernel or without; gives what the kernel was called with."""
        calls = []

        def kernel(query, key, value, boundaries, boundaries_again, longest, longest_again, *, scale, window_size):
            assert boundaries is boundaries_again
            assert longest == longest_again
            assert (boundaries.dtype, window_size) == (torch.int32, (-1, 0)), "-1, 0: causal"
            calls.append(query.shape)
            attended = []
            for start, end in itertools.pairwise(boundaries):
                assert end - start <= longest
                rows = (part[start:end].transpose(0, 1).float() for part in (query, key, value))
                attended.append(F.scaled_dot_product_attention(*rows, is_causal=True, scale=scale).transpose(0, 1))
            return torch.cat(attended).to(query.dtype)

        def arrange(has_kernel: bool):
            monkeypatch.setattr(attention, "_on_gpu", lambda query: True)
            monkeypatch.setattr(attention, "_has_kernel", lambda query, dropout: has_kernel)
            monkeypatch.setattr(attention, "varlen_attn", kernel)
            return calls

        return arrange

    @pytest.mark.parametrize("has_kernel", [False, True])
    @pytest.mark.parametrize("kind", ["of unequal length", "of equal length, some only in all"])
    def test_losses_and_gradients_are_the_same(self, pretend, kind, has_kernel):
        model, batch = golden_gpt(), make_batch(ROWS[kind])
        expected = passed(packed_loss, model, batch)
        calls = pretend(has_kernel)
        assert_same(passed(packed_loss, model, batch), expected)
        assert calls == [(batch.packing.num_positions, 4, 16)] * (2 if has_kernel else 0)

    @pytest.mark.parametrize(
        ("dtype", "dropout", "size", "capability", "usable"),
        [
            (torch.bfloat16, 0.0, 64, (8, 0), True),
            (torch.float16, 0.0, 64, (9, 0), True),
            (torch.float32, 0.0, 64, (9, 0), False),
            (torch.float16, 0.1, 64, (9, 0), False),
            (torch.float16, 0.0, 64, (7, 5), False),
            (torch.float16, 0.0, 20, (9, 0), False),
            (torch.float16, 0.0, 512, (9, 0), False),
        ],
    )
    def test_when_the_kernel_is_used(self, monkeypatch, dtype, dropout, size, capability, usable):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert attention._has_kernel(torch.zeros(1, 2, 3, size, dtype=dtype), dropout) == usable


class TestImplementation:
    def test_it_is_the_default_and_needs_no_mask(self):
        model, batch = golden_gpt(), make_batch(ROWS["of unequal length"])
        assert model.config._attn_implementation == "sdpa"
        assert model.gpt.config._attn_implementation == PACKED_SDPA
        masks = []
        model.gpt.h[0].register_forward_pre_hook(lambda module, args: masks.append(args[2]))
        gpt_loss(model, batch)
        assert masks == [None]

    def test_another_one_is_refused_and_the_way_back_is_open(self):
        model, batch = golden_gpt(), make_batch(ROWS["of unequal length"])
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match='"eager" would look across the rows'):
            gpt_loss(model, batch)
        model.set_attn_implementation("sdpa")
        assert model.gpt.config._attn_implementation == PACKED_SDPA
        gpt_loss(model, batch)

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_attention_dropout_reaches_it(self, dropout):
        model, batch = golden_gpt().train(), make_batch(ROWS["of unequal length"])
        for block in model.gpt.h:
            block.attn.attn_dropout.p = dropout
        losses = {float(gpt_loss(model, batch).mel.detach()) for _ in range(2)}
        assert len(losses) == (1 if dropout == 0 else 2)

    def test_a_compiled_block_gives_the_same_and_is_compiled_once(self):
        """Whatever the lengths; attention itself is left to PyTorch's own kernels."""
        from torch._dynamo.testing import CompileCounter

        counter, model = CompileCounter(), golden_gpt().train()
        batches = [make_batch(ROWS["of unequal length"][:count], seed=count) for count in (2, 3)]
        expected = [passed(packed_loss, model, batch) for batch in batches]
        model.gpt.h[0].compile(dynamic=True, backend=counter)
        try:
            found = [passed(packed_loss, model, batches[0])]
            graphs = counter.frame_count
            found += [passed(packed_loss, model, batch) for batch in batches[1:]]
        finally:
            torch._dynamo.reset()
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
        assert counter.frame_count == graphs > 0
