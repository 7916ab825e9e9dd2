"""What the documentation claims about training, shown on the demo: runs that differ in one setting each.

    python benchmarks/claims.py --output runs/claims --voices runs/base/corpus

Every run trains the demo voice for the demo's steps, on the same clips, from the same seed. Then all of them speak the
texts the voice never read, as a preview, and are judged as scripts/evaluate.py judges: by a recogniser with the demo's
grammar, by whether they end, by whom they sound like. Held-out losses are all measured in the same way, on the same
clips, whatever a run was trained on. `docs/why.md` shows the table. Takes the `evaluate` extra, and an hour or more on
two cores; runs and speech that are there already are not made again.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
VOICE = REPOSITORY / "examples" / "demo_voice"
BASE = REPOSITORY / "examples" / "demo_base"
CONFIG = REPOSITORY / "configs" / "demo.yaml"
HELD_OUT = 8
"""Every clip whose number divides by this is kept back from training."""
NUM_VOICES = 16
"""Speakers of the base's corpus that the demo voice is told from, of all kinds alike."""
TEMPERATURE = 0.3
"""Of the codes: low, so that what a model has learnt counts more than luck."""

VARIANTS: dict[str, dict[str, object]] = {
    "as it is": {},
    "stop-padded": {"data.padding": "stop"},
    "own-clip": {},
    "plain": {"training.micro_batch_size": 1, "training.eval_batch_size": 1},
    "shared conditioning": {"data.conditioning_group": 8},
    "larger steps": {"optim.learning_rate": 8e-4},
    "from scratch": {"model.from_scratch": True, "optim.learning_rate": 1e-3},
}
"""What each run differs in. Padding that counts as stops, as in the reference trainer; every clip conditioned on itself
instead of on others of its speaker; one clip at a time, without padding or grouping; eight clips of a step hearing the
same conditioning; four times the learning rate; random weights instead of the base's, at the learning rate the base was
trained with."""

JUDGED = ("wer", "ended", "as_long_as_expected", "judged_the_voice")
"""What is judged of speech: shares of the words that are wrong, and of the texts."""


def write_recordings(folder: Path, own_clip: bool) -> Path:
    """A copy of the demo voice with fixed lists; with `own_clip` every clip has a speaker of its own.

    A clip is conditioned on others of its speaker, and on itself where the speaker has no other.
    """
    if not (folder / "wavs").is_dir():
        shutil.copytree(VOICE / "wavs", folder / "wavs")
    lines = (VOICE / "metadata.csv").read_text(encoding="utf-8").splitlines()
    lists = {"train.txt": ["audio_file|text|speaker"], "val.txt": ["audio_file|text|speaker"]}
    for number, line in enumerate(lines, start=1):
        clip, _, text = line.split("|")
        speaker = clip if own_clip else "demo"
        lists["train.txt" if number % HELD_OUT else "val.txt"].append(f"wavs/{clip}.flac|{text}|{speaker}")
    for name, rows in lists.items():
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def write_voices(corpus: Path, folder: Path) -> Path:
    """Some speakers of the base's corpus, with their recordings."""
    header, *lines = (corpus / "metadata.csv").read_text(encoding="utf-8").splitlines()
    kinds: dict[str, list[str]] = {}
    for speaker in sorted({line.rsplit("|", 1)[1] for line in lines}):
        kinds.setdefault(speaker.rsplit("-", 1)[0], []).append(speaker)
    taking_turns = (speaker for each in itertools.zip_longest(*kinds.values()) for speaker in each if speaker)
    chosen = set(itertools.islice(taking_turns, NUM_VOICES))
    kept = [header, *(line for line in lines if line.rsplit("|", 1)[1] in chosen)]
    (folder / "wavs").mkdir(parents=True, exist_ok=True)
    for line in kept[1:]:
        name = line.split("|", 1)[0]
        shutil.copyfile(corpus / name, folder / name)
    (folder / "metadata.csv").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return folder


def flags_of(settings: dict[str, object]) -> list[str]:
    """Settings as a command line has them."""
    return [part for key, value in settings.items() for part in (f"--{key}", json.dumps(value).strip('"'))]


def settings_of(name: str, output: Path, max_steps: int | None = None) -> dict[str, object]:
    """All that a run changes in the demo's settings; `max_steps` None: the demo's."""
    own_clip = name == "own-clip"
    root = write_recordings(output / ("recordings-alone" if own_clip else "recordings"), own_clip)
    lists = {"data.root": str(root), "data.train_list": "train.txt", "data.eval_list": "val.txt"}
    run = {"training.output_dir": str(output / name.replace(" ", "-")), "samples.enabled": False}
    length = {} if max_steps is None else {"training.max_steps": max_steps}
    return {**lists, **run, **length, **VARIANTS[name]}


def held_out_loss(export: Path, output: Path) -> dict[str, float]:
    """Losses of an export on the clips kept back, conditioned on other clips, padding not counted."""
    from tortoise_hf.cli import load_config
    from tortoise_hf.config import Config
    from tortoise_hf.data.loader import build_batches
    from tortoise_hf.eval_loss import evaluate
    from tortoise_hf.machine import start_accelerator
    from tortoise_hf.models.pretrained import load_gpt, load_mel_norms
    from tortoise_hf.preparation import prepare_base_and_data

    flags = flags_of(settings_of("as it is", output) | {"model.base": str(export)})
    cfg = load_config(["--config", str(CONFIG), *flags], "", Config)
    accelerator = start_accelerator(cfg.training.seed)
    files, data = prepare_base_and_data(cfg, accelerator)
    model = load_gpt(files, False, 0).to(accelerator.device)
    _, batches = build_batches(cfg, accelerator, data.train, data.eval, load_mel_norms(files), model.config)
    return evaluate(accelerator, model, batches, cfg.optim)


def judge(exports: dict[str, Path], output: Path, voices: Path | None, num_texts: int) -> dict[str, dict]:
    """Have all speak the unseen texts; the columns of evaluation.json by name."""
    folder = output / "evaluation"
    if not (folder / "evaluation.json").is_file():
        command = [sys.executable, str(REPOSITORY / "scripts" / "evaluate.py"), "--preview", "--out", str(folder)]
        command += ["--temperature", str(TEMPERATURE)]
        command += ["--data", str(VOICE), "--texts", str(VOICE / "unseen.txt"), "--num_texts", str(num_texts)]
        command += ["--asr", "pocketsphinx", "--grammar", str(VOICE / "grammar.jsgf")]
        command += [] if voices is None else ["--voices", str(write_voices(voices, output / "voices"))]
        for export in exports.values():
            command += ["--voice", str(export)]
        subprocess.run(command, check=True)
    columns = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["columns"]
    return {column["name"]: column for column in columns}


def percent(value: float | None) -> str:
    """A share as the table has it."""
    return "" if value is None else f"{100 * value:.1f} %"


def table(rows: dict[str, dict]) -> str:
    """Markdown, one line per run."""
    lines = [
        "| | held-out mel loss | words wrong | end | length as expected | judged the demo voice |",
        "|---" * 6 + "|",
    ]
    for name, row in rows.items():
        loss = "" if row["mel_loss"] is None else f"{row['mel_loss']:.3f}"
        cells = [name, loss, *(percent(row[key]) for key in JUDGED)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Train what isn't trained yet, judge all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--voices", type=Path, help="the base's corpus, to tell the demo voice from others")
    parser.add_argument(
        "--num_texts", type=int, default=100, help="texts every run speaks (default: %(default)s); 0: losses only"
    )
    parser.add_argument(
        "--runs", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="some of them instead of all"
    )
    parser.add_argument("--max_steps", type=int, help="optimizer steps (the demo's)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args(argv)
    # What judging takes is looked for now, not after an hour of training.
    if args.num_texts and importlib.util.find_spec("pocketsphinx") is None:
        parser.error("pocketsphinx isn't installed: pip install -c constraints.txt -e '.[evaluate]', or --num_texts 0")
    if args.voices is not None and not (args.voices / "metadata.csv").is_file():
        parser.error(f"--voices: {args.voices} holds no metadata.csv; make base makes the corpus, or leave it out.")
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)

    exports = {"the base": BASE}
    for name in args.runs:
        settings = settings_of(name, output, args.max_steps)
        command = [sys.executable, str(REPOSITORY / "scripts" / "train.py"), "--config", str(CONFIG)]
        subprocess.run([*command, *flags_of(settings)], check=True, cwd=REPOSITORY)
        exports[name] = Path(str(settings["training.output_dir"])) / "export"
    rows = {
        name: {"mel_loss": held_out_loss(export, output)["eval_mel_loss"]} | dict.fromkeys(JUDGED)
        for name, export in exports.items()
    }
    if args.num_texts:
        columns = judge(exports, output, args.voices, args.num_texts)
        heard = {
            name: columns[export.name if export == BASE else export.parent.name] for name, export in exports.items()
        }
        rows = {name: {"mel_loss": None} for name in ("recordings", "resynthesised")} | rows
        for name, row in rows.items():
            column = heard.get(name) or columns[name]
            words, speaker = column["words"], column["speaker"]
            judged = (
                words and words["wer"],
                column["ended"],
                column["as_long_as_expected"],
                speaker and speaker["nearest_is_target"],
            )
            row |= dict(zip(JUDGED, judged, strict=True))
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
