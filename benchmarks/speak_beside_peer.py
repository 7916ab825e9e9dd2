"""This package beside tortoise-tts 3.0.0: the same random weights of the released sizes, the same text, the same work.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/speak_beside_peer.py --threads 1

Four ways to say a text take turns, each in a process of its own: this package as it is and with `low_memory`;
tortoise-tts as it comes (no key-value cache, on a CPU one sample at a time) and at its best (cache on, all samples
together). Then both make the mel and the sound of the same codes with the same noise, which must be equal. tortoise-tts
is installed from PyPI into an environment of its own, see tests/peer/environment.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from peer.cost import measured, peak_gib  # noqa: E402
from peer.environment import peer_environment  # noqa: E402
from peer.released import NAMES, write_released  # noqa: E402
from peer.runner import PeerRunner  # noqa: E402
from random_models import builders  # noqa: E402

TEXT = "The kettle is on, so sit down and tell me about your day."
SEED = 5
WAYS = {
    "ours": {"low_memory": False},
    "ours, low_memory": {"low_memory": True},
    "tortoise-tts": {},
    "tortoise-tts, cached": {"kv_cache": True},
}
"""Options of each way; the number of samples is also the batch size of the last."""
MOST_DIFFERENCE = 1e-3


def write_weights(folder: Path, peer_data: Path) -> None:
    """The published files with random weights, the small ones as tortoise-tts brings them, and a random speaker."""
    folder.mkdir(parents=True, exist_ok=True)
    models = builders("released")
    for name in NAMES:
        torch.manual_seed(0)
        write_released(name, models[name](), folder)
    for name in ("tokenizer.json", "mel_norms.pth"):
        shutil.copy(peer_data / name, folder)
    torch.save((torch.randn(1, 1024), torch.randn(1, 2048)), folder / "latents.pth")


def our_voice(weights: Path, low_memory: bool = False):
    """The voice in a folder of `write_weights`."""
    from tortoise_hf.voice import Voice

    return Voice.from_pretrained(
        "released", weights_dir=weights, latents=weights / "latents.pth", device="cpu", low_memory=low_memory
    )


def our_measure(task: dict) -> dict:
    """What it costs this package, as `measure` of tests/peer/whole_chain.py has it for the other."""
    from tortoise_hf.presets import choose_preset

    numbers = {"num_samples": task["samples"], "max_codes": task["codes"], "steps": task["steps"]}
    preset = choose_preset("standard", **numbers)

    def load():
        voice = our_voice(Path(task["weights"]), task["low_memory"])
        if not task["low_memory"]:  # models are loaded when they are needed; here all at once, as the other does
            for name in NAMES:
                with voice.chain.shelf.use(name):
                    pass
        return voice

    voice, loading = measured(load)
    speech, speaking = measured(lambda: voice.speak(task["text"], preset=preset))
    return {"loading": loading, "speaking": speaking, "peak_gib": peak_gib(), "audio_seconds": speech.seconds}


def our_chain(task: dict, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scores, mel and waveform of given codes, as `whole_chain` of tests/peer/whole_chain.py has them for the other."""
    from tortoise_hf.generation import clean_codes
    from tortoise_hf.latents import VoiceLatents
    from tortoise_hf.samplers import DiffusionSettings

    chain = our_voice(Path(task["weights"]), low_memory=True).chain
    latents = VoiceLatents(inputs["gpt"], inputs["diffusion"])
    text_ids = chain.text_ids(task["text"])
    cleaned = clean_codes(inputs["codes"], chain.gpt_config.stop_mel_id)
    scores = chain.rank(text_ids, cleaned)
    noise = torch.Generator().manual_seed(task["seed"])
    settings = DiffusionSettings(sampler="ancestral", steps=task["steps"])
    mel = chain.mel(chain.latents(text_ids, cleaned[int(scores.argmax())], latents), latents, settings, noise)
    return {"scores": scores, "mel": mel, "waveform": chain.waveform(mel, noise)}


def run_ours(name: str, folder: Path, threads: int, inputs: dict | None = None, **task) -> dict:
    """`our_measure` or `our_chain` in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps(task))
    if inputs is not None:
        save_file(inputs, folder / "inputs.safetensors")
    command = [sys.executable, __file__, "--task", name, "--folder", str(folder)]
    values = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=os.environ | values, check=True)
    return load_file(folder / "outputs.safetensors") if inputs else json.loads((folder / "answer.json").read_text())


def do_task(name: str, folder: Path) -> None:
    """What `run_ours` starts."""
    task = json.loads((folder / "task.json").read_text())
    if name == "measure":
        (folder / "answer.json").write_text(json.dumps(our_measure(task)))
    else:
        outputs = our_chain(task, load_file(folder / "inputs.safetensors"))
        save_file({key: tensor.contiguous() for key, tensor in outputs.items()}, folder / "outputs.safetensors")


def compare(peer: PeerRunner, weights: Path, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Largest differences of what both make of the same codes and the same noise."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 8192, (args.samples, args.codes), generator=generator)
    codes[0, args.codes // 2 :] = 8193  # one row that ended
    gpt, diffusion = torch.load(weights / "latents.pth", weights_only=True)
    inputs = {"codes": codes, "gpt": gpt, "diffusion": diffusion}
    task = {"weights": str(weights), "text": TEXT, "seed": SEED, "steps": args.steps}
    ours = run_ours("chain", folder / "ours", args.threads, inputs, **task)
    options = {"clips": [], "guidances": [2.0], "autoregressive_batch_size": args.samples}
    theirs, _ = peer.run("whole_chain", folder / "theirs", inputs, **options, **task)
    pairs = {
        "scores": (ours["scores"], theirs["scores"]),
        "mel": (ours["mel"], theirs["mel_2.0"]),
        "waveform": (ours["waveform"], theirs["waveform_2.0"].flatten()),
    }
    return {name: float((mine - other).abs().max()) for name, (mine, other) in pairs.items()}


def summarize(runs: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Medians of each way's runs."""
    return {
        name: {
            "seconds": statistics.median(run["speaking"]["seconds"] for run in each),
            "cpu_seconds": statistics.median(run["speaking"]["cpu_seconds"] for run in each),
            "loading_cpu_seconds": statistics.median(run["loading"]["cpu_seconds"] for run in each),
            "peak_gib": statistics.median(run["peak_gib"] for run in each),
        }
        for name, each in runs.items()
    }


def table(medians: dict[str, dict[str, float]]) -> str:
    """A line for each way, with how many times longer it takes than ours."""
    ours = medians["ours"]
    lines = [
        "| | seconds | computing | times ours | loading, computing | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in medians.items():
        ratio = each["cpu_seconds"] / ours["cpu_seconds"]
        lines.append(
            f"| {name} | {each['seconds']:.1f} | {each['cpu_seconds']:.1f} | {ratio:.2f} | "
            f"{each['loading_cpu_seconds']:.1f} | {each['peak_gib']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Measure by turns, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--codes", type=int, default=40, help="of each sample (40 codes: 1.9 s)")
    parser.add_argument("--steps", type=int, default=10, help="of the diffusion model")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--weights", type=Path, help="folder kept between runs; left out: one is made and deleted")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.task is not None:
        return do_task(args.task, args.folder)
    peer = PeerRunner(peer_environment(), args.threads, timeout=7200)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tortoise_hf_beside_peer_")))
        weights = args.weights or folder / "weights"
        if not (weights / "latents.pth").is_file():
            write_weights(weights, next(peer.peer.python.parents[1].glob("lib/python*/site-packages/tortoise/data")))
        work = {"samples": args.samples, "codes": args.codes, "steps": args.steps, "text": TEXT}
        runs: dict[str, list[dict]] = {name: [] for name in WAYS}
        for turn in range(args.repeats):
            for place, (name, options) in enumerate(WAYS.items()):
                task = {"weights": str(weights), **work, **options}
                where = folder / f"{turn}-{place}"
                if name.startswith("ours"):
                    answer = run_ours("measure", where, args.threads, **task)
                else:
                    task |= {"autoregressive_batch_size": args.samples} if "kv_cache" in options else {}
                    _, answer = peer.run("measure", where, **task)
                runs[name].append(answer)
                print(f"turn {turn + 1}, {name}: {json.dumps(answer)}", file=sys.stderr, flush=True)
        differences = compare(peer, weights, folder / "compare", args)
    medians = summarize(runs)
    result = {
        "work": {**work, "threads": args.threads, "repeats": args.repeats},
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {"torch": torch.__version__, "transformers of tortoise-tts": peer.peer.transformers},
        "medians": medians,
        "runs": runs,
        "largest_differences": differences,
    }
    print(table(medians))
    print(f"Largest differences for the same codes and noise: {json.dumps(differences)}")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if differences["mel"] > MOST_DIFFERENCE:
        sys.exit(f"The mels differ by {differences['mel']:.1e}, more than {MOST_DIFFERENCE:.0e}.")
    return result


if __name__ == "__main__":
    main()
