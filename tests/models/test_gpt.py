"""GPT: the golden vectors of the released implementation, its key names, precision and checkpointing."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
import transformers
from conftest import GOLDEN, reference_path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT

CLOSE = {"atol": 1e-4, "rtol": 0}
SIZES = tuple(GPTConfig.__annotations__)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "gpt.safetensors")


@pytest.fixture(scope="module")
def config():
    with safe_open(GOLDEN / "gpt.safetensors", "pt") as file:
        sizes = json.loads(file.metadata()["config"])
    config = GPTConfig(
        num_layers=sizes["layers"],
        hidden_size=sizes["model_dim"],
        num_heads=sizes["heads"],
        num_text_tokens=sizes["number_text_tokens"],
        max_text_tokens=sizes["max_text_tokens"],
        num_mel_codes=sizes["number_mel_codes"] - 2,
        max_mel_tokens=sizes["max_mel_tokens"],
        max_conditioning_inputs=sizes["max_conditioning_inputs"],
    )
    assert (config.start_text_id, config.stop_text_id) == (sizes["start_text_token"], sizes["stop_text_token"])
    assert (config.start_mel_id, config.stop_mel_id) == (sizes["start_mel_token"], sizes["stop_mel_token"])
    return config


@pytest.fixture(scope="module")
def state(golden):
    return {key[3:]: value for key, value in golden.items() if key.startswith("sd.")}


@pytest.fixture
def model(config, state):
    model = TortoiseGPT(copy.deepcopy(config))
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture(scope="module")
def rows(golden, config):
    """Inputs of the released training forward, made from its targets: START, then the targets less their last STOP."""
    text_targets, mel_targets = golden["out.ref.text_targets"], golden["out.ref.mel_targets"]
    start_text = torch.full_like(text_targets[:, :1], config.start_text_id)
    start_mel = torch.full_like(mel_targets[:, :1], config.start_mel_id)
    text_inputs = torch.cat([start_text, text_targets[:, :-1]], dim=1)
    mel_inputs = torch.cat([start_mel, mel_targets[:, :-1]], dim=1)
    assert text_inputs[:, 1:-1].tolist() == golden["in.text"][:, : text_inputs.shape[1] - 2].tolist()
    return text_inputs, mel_inputs


def released_losses(output, golden):
    """Text and mel loss as the released training code takes them: padding counts."""
    return (
        cross_entropy(output.text_logits.flatten(0, 1), golden["out.ref.text_targets"].flatten()),
        cross_entropy(output.mel_logits.flatten(0, 1), golden["out.ref.mel_targets"].flatten()),
    )


class TestGoldenVectors:
    def test_conditioning(self, model, golden):
        mels = golden["in.cond_mels"]
        per_clip = torch.stack([model.encode_conditioning(mels[:, clip]) for clip in range(mels.shape[1])], dim=1)
        torch.testing.assert_close(per_clip, golden["out.ref.cond_per_clip"], **CLOSE)
        torch.testing.assert_close(model.encode_conditioning(mels), golden["out.ref.cond_latent"], **CLOSE)

    def test_training_forward(self, model, golden, rows):
        output = model(*rows, conditioning_mel=golden["in.cond_mels"])
        torch.testing.assert_close(output.text_logits.transpose(1, 2), golden["out.ref.text_logits"], **CLOSE)
        torch.testing.assert_close(output.mel_logits.transpose(1, 2), golden["out.ref.mel_logits"], **CLOSE)
        torch.testing.assert_close(output.latents[:, :-2], golden["out.ref.return_latent"], **CLOSE)
        text_loss, mel_loss = released_losses(output, golden)
        torch.testing.assert_close(text_loss, golden["out.ref.loss_text"], **CLOSE)
        torch.testing.assert_close(mel_loss, golden["out.ref.loss_mel"], **CLOSE)
        from_latent = model(*rows, conditioning_latent=golden["out.ref.cond_latent"])
        torch.testing.assert_close(from_latent.mel_logits, output.mel_logits, **CLOSE)

    def test_latents_of_finished_codes(self, model, golden):
        """Of text ids that end in the one STOP released inference appends."""
        assert golden["in.api.text_tokens"][0, -1] == 0
        latents = model.latents(golden["in.api.text_tokens"], golden["in.api.codes"], golden["in.api.cond_latent"])
        torch.testing.assert_close(latents, golden["out.api.latents"], **CLOSE)

    @pytest.mark.parametrize("row", [0, 1])
    def test_greedy_steps(self, model, golden, config, row):
        """Prompt of released sampling: START, the text, two STOPs; then codes one by one from position 0."""
        codes, expected = golden[f"out.greedy.rp1.b{row}"], golden[f"out.greedy.step_logits.b{row}"]
        text = golden["in.text"][row, : golden["in.text_lengths"][row]].tolist()
        text_inputs = torch.tensor([[config.start_text_id, *text, 0, 0]])
        mel_inputs = torch.cat([torch.tensor([[config.start_mel_id]]), codes[:, :-1]], dim=1)
        latent = model.encode_conditioning(golden["in.cond_mels"][row : row + 1])
        logits = model(text_inputs, mel_inputs, conditioning_latent=latent).mel_logits
        torch.testing.assert_close(logits[:, : expected.shape[1]], expected, **CLOSE)
        stop = codes[0].tolist().index(config.stop_mel_id) + 1 if config.stop_mel_id in codes else codes.shape[1]
        assert logits.argmax(-1)[0, :stop].tolist() == codes[0, :stop].tolist()

    def test_weights_in_the_published_layout(self, model):
        """The small file in the released layout holds the same weights plus one mask and one scalar per block."""
        published = torch.load(GOLDEN / "100_gpt.pth", weights_only=True, map_location="cpu")
        extra = published.keys() - model.state_dict().keys()
        assert extra == {f"gpt.h.{layer}.attn.{name}" for layer in range(2) for name in ("bias", "masked_bias")}
        assert all(torch.equal(value, published[key]) for key, value in model.state_dict().items())


class TestNotTheForksSemantics:
    """A widely used fork changed the function behind the same weights; its results must not come back."""

    def test_residual_comes_from_the_unnormalised_input(self, model, golden, rows):
        """F2: the fork adds the attention to the normalised input."""
        mels = golden["in.cond_mels"]
        per_clip = torch.stack([model.encode_conditioning(mels[:, clip]) for clip in range(2)], dim=1)
        assert (per_clip - golden["out.fork.cond_per_clip"]).abs().max() > 0.1
        block = model.conditioning_encoder.attn[0]
        nn.init.zeros_(block.proj_out.weight)
        nn.init.zeros_(block.proj_out.bias)
        hidden = torch.randn(2, 64, 9)
        assert torch.equal(block(hidden), hidden)
        text_loss, mel_loss = released_losses(model(*rows, conditioning_mel=mels), golden)
        assert abs(text_loss - golden["out.dlas_nocompat_avg.loss_text"]) > 1e-3
        assert abs(mel_loss - golden["out.dlas_nocompat_avg.loss_mel"]) > 1e-3

    def test_clips_share_one_position(self, model, golden, rows):
        """F3: the fork gives each clip a position of its own."""
        lengths = []
        model.gpt.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        output = model(*rows, conditioning_mel=golden["in.cond_mels"])
        assert lengths == [1 + rows[0].shape[1] + rows[1].shape[1]]
        text_loss, mel_loss = released_losses(output, golden)
        assert abs(text_loss - golden["out.two_tokens.loss_text"]) > 0.05
        assert abs(mel_loss - golden["out.two_tokens.loss_mel"]) > 0.005

    def test_latent_is_the_mean_over_clips_at_their_first_frame(self, model, golden):
        mels = golden["in.cond_mels"]
        per_clip = [model.encode_conditioning(mels[:, clip]) for clip in range(2)]
        latent = model.encode_conditioning(mels)
        torch.testing.assert_close(latent, (per_clip[0] + per_clip[1]) / 2, atol=1e-6, rtol=0)
        encoder = model.conditioning_encoder
        assert torch.allclose(encoder.attn(encoder.init(mels[:, 0]))[:, :, 0], per_clip[0], atol=1e-6)
        torch.testing.assert_close(model.encode_conditioning(mels.flip(1)), latent, atol=1e-6, rtol=0)

    def test_outputs_are_not_the_forks(self, model, golden, rows):
        """F1-F3 together, on the positions both have."""
        output = model(*rows, conditioning_mel=golden["in.cond_mels"])
        text, mel = golden["out.fork.text_logits"], golden["out.fork.mel_logits"]
        assert (output.text_logits.transpose(1, 2) - text).abs().max() > 0.1
        assert (output.mel_logits.transpose(1, 2) - mel[:, :, : rows[1].shape[1]]).abs().max() > 0.1

    def test_inputs_are_left_alone(self, model, golden, rows):
        """F1: the fork multiplies the caller's lengths in place."""
        inputs = [*(row.clone() for row in rows), golden["in.cond_mels"].clone()]
        model(*inputs[:2], conditioning_mel=inputs[2])
        for after, before in zip(inputs, [*rows, golden["in.cond_mels"]], strict=True):
            assert torch.equal(after, before)


def random_rows(config, generator, text_lengths, mel_lengths):
    """Rows of the given lengths, padded with STOP to the longest."""
    batch, text_size, mel_size = len(text_lengths), max(text_lengths), max(mel_lengths)
    text = torch.randint(1, config.num_text_tokens, (batch, text_size), generator=generator)
    mel = torch.randint(0, config.num_mel_codes, (batch, mel_size), generator=generator)
    text[:, 0], mel[:, 0] = config.start_text_id, config.start_mel_id
    for row, (num_text, num_mel) in enumerate(zip(text_lengths, mel_lengths, strict=True)):
        text[row, num_text:] = config.stop_text_id
        mel[row, num_mel:] = config.stop_mel_id
    return text, mel


class TestArchitecture:
    def test_released_sizes(self):
        with torch.device("meta"):
            model = TortoiseGPT(GPTConfig())
        assert len(model.state_dict()) == 410
        assert sum(parameter.numel() for parameter in model.parameters()) == 421_526_786
        assert sum(tensor.numel() for tensor in model.state_dict().values()) == 421_526_786
        assert not [key for key in model.state_dict() if "wte" in key or "wpe" in key]

    def test_released_key_names(self):
        table = json.loads(reference_path("state_dict_keys/autoregressive_no_attn_buffers.json").read_text())
        with torch.device("meta"):
            tensors = TortoiseGPT(GPTConfig()).state_dict()
        found = {key: (list(tensor.shape), str(tensor.dtype)) for key, tensor in tensors.items()}
        assert found == {key: (entry["shape"], "torch." + entry["dtype"]) for key, entry in table.items()}

    def test_released_ids(self):
        config = GPTConfig()
        assert (config.start_text_id, config.stop_text_id, config.text_vocabulary) == (255, 0, 256)
        assert (config.start_mel_id, config.stop_mel_id, config.mel_vocabulary) == (8192, 8193, 8194)
        assert (config.text_positions, config.mel_positions) == (404, 608)

    def test_building_one_warns_of_nothing(self, config, caplog):
        transformers.utils.logging.enable_propagation()
        TortoiseGPT(copy.deepcopy(config))
        transformers.utils.logging.disable_propagation()
        assert caplog.text == ""

    def test_every_parameter_is_trained(self, model, golden, rows):
        sum(released_losses(model(*rows, conditioning_mel=golden["in.cond_mels"]), golden)).backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]

    def test_dropout_sits_in_the_four_places_of_gpt2(self, model):
        places = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
        block = {"attn.attn_dropout", "attn.resid_dropout", "mlp.dropout"}
        expected = {"gpt.drop"} | {f"gpt.h.{layer}.{name}" for layer in range(2) for name in block}
        assert places == dict.fromkeys(expected, 0.1)

    def test_dropout_of_zero_reaches_every_place(self, config, golden, rows, state):
        model = TortoiseGPT(GPTConfig(**{**config.to_dict(), "dropout": 0.0})).train()
        model.load_state_dict(state)
        output = model(*rows, conditioning_mel=golden["in.cond_mels"])
        torch.testing.assert_close(output.mel_logits.transpose(1, 2), golden["out.ref.mel_logits"], **CLOSE)

    def test_fresh_weights(self, config):
        torch.manual_seed(0)
        model = TortoiseGPT(config)
        for embedding in (model.text_embedding, model.mel_embedding, model.mel_pos_embedding.emb):
            assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert embedding.weight.mean().item() == pytest.approx(0.0, abs=0.002)
        for block in model.conditioning_encoder.attn:
            assert block.proj_out.weight.abs().max() == 0
            assert block.qkv.weight.std() > 0.01
        assert model.gpt.h[0].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.gpt.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
        assert model.final_norm.weight.min() == model.gpt.ln_f.weight.min() == 1

    def test_a_fresh_model_knows_nothing(self, config):
        """Its loss is that of a uniform guess."""
        torch.manual_seed(0)
        model = TortoiseGPT(config).eval()
        text, mel = random_rows(config, torch.Generator().manual_seed(0), [20], [40])
        output = model(text, mel, conditioning_mel=torch.randn(1, 1, 80, 20))
        loss = cross_entropy(output.mel_logits[0, :-1], mel[0, 1:])
        assert loss.item() == pytest.approx(math.log(config.mel_vocabulary), abs=0.2)

    @pytest.mark.parametrize("text_size, mel_size, word", [(43, 5, "text"), (5, 65, "mel")])
    def test_too_long_rows_are_refused(self, model, golden, text_size, mel_size, word):
        text, mel = torch.zeros(1, text_size, dtype=torch.long), torch.zeros(1, mel_size, dtype=torch.long)
        with pytest.raises(ValueError, match=f"a {word} row has {max(text_size, mel_size)} positions"):
            model(text, mel, conditioning_latent=golden["in.api.cond_latent"])

    def test_exactly_one_conditioning(self, model, golden, rows):
        with pytest.raises(ValueError, match="either"):
            model(*rows)
        with pytest.raises(ValueError, match="not both"):
            model(*rows, golden["in.cond_mels"], golden["out.ref.cond_latent"])

    def test_heads_must_divide_the_width(self):
        with pytest.raises(ValueError, match="hidden_size 64 must divide by num_heads 5"):
            GPTConfig(hidden_size=64, num_heads=5)


class TestPrecisionAndMemory:
    def test_sdpa_equals_eager(self, config, state, golden, rows):
        outputs = {}
        for implementation in ("sdpa", "eager"):
            model = TortoiseGPT._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
            model.load_state_dict(state)
            assert model.gpt.config._attn_implementation.removeprefix("packed_") == implementation
            outputs[implementation] = model(*rows, conditioning_mel=golden["in.cond_mels"])
        for one, other in zip(outputs["sdpa"], outputs["eager"], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_gradient_checkpointing_gives_the_same_gradients(self, config, state, golden, rows, dropout):
        gradients, recomputed = [], []
        for checkpointing in (False, True):
            model = TortoiseGPT(GPTConfig(**{**config.to_dict(), "dropout": dropout})).train()
            model.load_state_dict(state)
            if checkpointing:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)
                    model.gradient_checkpointing_enable()
            calls = []
            model.gpt.h[0].mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
            torch.manual_seed(3)
            output = model(*rows, conditioning_mel=golden["in.cond_mels"])
            sum(released_losses(output, golden)).backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
            recomputed.append(len(calls))
        assert recomputed == [1, 2], "the blocks run again in the backward pass"
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5, msg=name)

    @pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.25), (torch.float16, 0.03)])
    def test_autocast(self, model, golden, rows, dtype, limit):
        with torch.autocast("cpu", dtype=dtype):
            output = model(*rows, conditioning_mel=golden["in.cond_mels"])
            text_loss, mel_loss = released_losses(output, golden)
        difference = (output.mel_logits.float().transpose(1, 2) - golden["out.ref.mel_logits"]).abs().max()
        assert 0 < difference < limit
        assert mel_loss.item() == pytest.approx(golden["out.ref.loss_mel"].item(), abs=limit / 5)
        (0.01 * text_loss + mel_loss).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_weights_of_half_precision(self, model, golden, rows, dtype):
        output = model.to(dtype)(*rows, conditioning_mel=golden["in.cond_mels"].to(dtype))
        assert output.mel_logits.dtype == dtype
        assert (output.mel_logits.float().transpose(1, 2) - golden["out.ref.mel_logits"]).abs().max() < 0.5


class TestFiles:
    def test_save_and_load_round_trip(self, model, tmp_path, golden, rows):
        model.save_pretrained(tmp_path)
        loaded, info = TortoiseGPT.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        expected = model.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
        assert load_file(tmp_path / "model.safetensors").keys() == expected.keys()
        assert {key: getattr(loaded.config, key) for key in SIZES} == {key: getattr(model.config, key) for key in SIZES}
        one = model(*rows, conditioning_mel=golden["in.cond_mels"])
        other = loaded(*rows, conditioning_mel=golden["in.cond_mels"])
        assert torch.equal(one.mel_logits, other.mel_logits)

    def test_missing_and_unexpected_tensors_are_named(self, model, tmp_path):
        """Whoever loads can see them; only the released file's causal masks pass without a word."""
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["gpt.h.1.attn.c_attn.bias"], tensors["conditioning_encoder.attn.3.qkv.weight"]
        for name in ("gpt.h.0.attn.bias", "gpt.h.0.attn.masked_bias", "gpt.h.7.attn.c_attn.bias", "gpt.wte.weight"):
            tensors[name] = torch.zeros(1)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        info = TortoiseGPT.from_pretrained(tmp_path, output_loading_info=True)[1]
        assert set(info["missing_keys"]) == {"gpt.h.1.attn.c_attn.bias", "conditioning_encoder.attn.3.qkv.weight"}
        assert set(info["unexpected_keys"]) == {"gpt.h.7.attn.c_attn.bias", "gpt.wte.weight"}

    def test_config_survives_json(self, tmp_path):
        GPTConfig(num_layers=3, num_text_tokens=99).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert (written["model_type"], written["tie_word_embeddings"]) == ("tortoise_gpt", False)
        assert {"num_layers", "max_mel_tokens", "dropout"} <= set(SIZES) <= written.keys()
        loaded = GPTConfig.from_pretrained(tmp_path)
        assert (loaded.num_layers, loaded.start_text_id, loaded.num_hidden_layers) == (3, 99, 3)
