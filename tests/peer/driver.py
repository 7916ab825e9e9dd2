"""Runs inside the peer's environment: loads tortoise-tts's own classes, does one task, writes what came out.

    python driver.py TASK FOLDER

reads FOLDER/task.json and FOLDER/inputs.safetensors, writes FOLDER/outputs.safetensors and FOLDER/answer.json. Nothing
of tortoise_hf is imported here.
"""

import inspect
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tortoise.models.autoregressive import UnifiedVoice
from whole_chain import measure, whole_chain


def build(task):
    return UnifiedVoice(**task["peer_config"], checkpointing=False, train_solo_embeddings=False).eval()


def load_strictly(model, path):
    """The message of a strict load, or None if it went through."""
    try:
        model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    except RuntimeError as error:
        return str(error)
    return None


def load_as_api_does(model, path):
    """What api.py's lenient load leaves out and what it doesn't know."""
    return model.load_state_dict(torch.load(path), strict=False)._asdict()


def layouts(task, folder, inputs):
    """Which files load strictly (name -> None or the error), how api.py loads them, and a full-size key table."""
    table = {}
    if "full_size" in task:
        with torch.device("meta"):
            table = build({"peer_config": task["full_size"]}).state_dict()
    return {}, {
        "errors": {name: load_strictly(build(task), path) for name, path in task["files"].items()},
        "lenient": {name: load_as_api_does(build(task), path) for name, path in task["files"].items()},
        "table": {key: [list(tensor.shape), str(tensor.dtype)] for key, tensor in table.items()},
    }


def speak(task, folder, inputs):
    """Everything the peer computes from a weights file: conditioning, losses, logits, latents, greedy codes."""
    model = build(task)
    error = load_strictly(model, task["weights"])
    assert error is None, error
    outputs = {}
    with torch.no_grad():
        latent = model.get_conditioning(inputs["conditioning_mel"])
        outputs["conditioning_latent"] = latent
        arguments = (latent, inputs["text"], inputs["text_lengths"], inputs["mel_codes"], inputs["wav_lengths"])
        loss_text, loss_mel, outputs["mel_logits"] = model(*arguments)
        outputs["loss_text"], outputs["loss_mel"] = loss_text, loss_mel
        outputs["text_logits"] = text_logits(model, *arguments)
        # As api.py does for finished codes: the text with one more STOP, codes as they are.
        text = torch.nn.functional.pad(inputs["text"][:1], (0, 1))
        codes = inputs["mel_codes"][:1]
        lengths = torch.tensor([codes.shape[1] * model.mel_length_compression])
        outputs["latents"] = model(
            latent[:1], text, torch.tensor([text.shape[1]]), codes, lengths, return_latent=True, clip_inputs=False
        )
        model.post_init_gpt2_config(kv_cache=False)
        # What a user of tortoise-tts does, which has no option for a weights file: load into the finished object.
        late = build(task)
        late.post_init_gpt2_config(kv_cache=False)
        late.load_state_dict(torch.load(task["late_weights"], weights_only=True), strict=False)
        for penalty in task["repetition_penalties"]:
            for name, speaker in (("greedy", model), ("loaded_late", late)):
                outputs[f"{name}_{penalty}"] = speaker.inference_speech(
                    latent[:1],
                    text,
                    do_sample=False,
                    num_return_sequences=1,
                    repetition_penalty=penalty,
                    max_generate_length=task["num_codes"],
                )
    return outputs, {}


def text_logits(model, latent, text, text_lengths, mel_codes, wav_lengths):
    """The text head's logits of the peer's forward pass, caught where it computes its loss."""
    caught = []
    real = torch.nn.functional.cross_entropy

    def catch(logits, targets):
        caught.append(logits)
        return real(logits, targets)

    torch.nn.functional.cross_entropy = catch
    try:
        model(latent, text, text_lengths, mel_codes, wav_lengths)
    finally:
        torch.nn.functional.cross_entropy = real
    return caught[0]


def save(task, folder, inputs):
    """State dicts as the peer saves them: fresh, and after generation was set up (with its duplicates)."""
    torch.manual_seed(task["seed"])
    model = build(task)
    with torch.no_grad():  # fresh conditioning blocks are zero at their ends and would hide mistakes
        for name, parameter in model.named_parameters():
            if name.endswith("proj_out.weight"):
                parameter.normal_(0, 0.05)
    torch.save(model.state_dict(), folder / "early.pth")
    with torch.no_grad():
        latent = model.get_conditioning(inputs["conditioning_mel"])
        arguments = (latent, inputs["text"], inputs["text_lengths"], inputs["mel_codes"], inputs["wav_lengths"])
        mel_logits = model(*arguments)[2]
    early = len(model.state_dict())
    model.post_init_gpt2_config(kv_cache=False)
    torch.save(model.state_dict(), folder / "late.pth")
    return {"conditioning_latent": latent, "mel_logits": mel_logits}, {"early": early, "late": len(model.state_dict())}


def front_ends(task, folder, inputs):
    """Text ids of the texts; conditioning mels of the recordings, as api.py computes them."""
    from tortoise.api import format_conditioning
    from tortoise.utils.audio import load_audio
    from tortoise.utils.tokenizer import VoiceBpeTokenizer

    tokenizer = VoiceBpeTokenizer(**({"vocab_file": task["tokenizer"]} if task.get("tokenizer") else {}))
    mels, waveforms = {}, {}
    for name, path in task["clips"].items():
        waveform = load_audio(path, 22050)
        waveforms[f"waveform.{name}"] = waveform
        mels[f"mel.{name}"] = format_conditioning(waveform, device="cpu")
    return {**mels, **waveforms}, {
        "ids": [tokenizer.encode(text) for text in task["texts"]],
        "tokenizer": inspect.getfile(VoiceBpeTokenizer),
    }


def condition(task, folder, inputs):
    """Conditioning vectors of groups of recordings, from the files on: as api.py's get_conditioning_latents does it."""
    from tortoise.api import format_conditioning
    from tortoise.utils.audio import load_audio

    model = build(task)
    error = load_strictly(model, task["weights"])
    assert error is None, error
    vectors = []
    with torch.no_grad():
        for clips in task["groups"]:
            mels = [format_conditioning(load_audio(path, 22050), device="cpu") for path in clips]
            vectors.append(model.get_conditioning(torch.stack(mels, dim=1)))
    return {"latents": torch.cat(vectors)}, {}


TASKS = {task.__name__: task for task in (layouts, speak, save, front_ends, condition, whole_chain, measure)}


def main():
    import transformers

    name, folder = sys.argv[1], Path(sys.argv[2])
    task = json.loads((folder / "task.json").read_text())
    path = folder / "inputs.safetensors"
    outputs, answer = TASKS[name](task, folder, load_file(path) if path.exists() else {})
    save_file({key: tensor.contiguous() for key, tensor in outputs.items()}, folder / "outputs.safetensors")
    result = {"transformers": transformers.__version__, "torch": torch.__version__, "answer": answer}
    (folder / "answer.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
