"""Make the small base that `make demo` fine-tunes; `make base` runs all of it, from text to shipped weights.

    python scripts/make_demo_base.py start --corpus runs/base/corpus --dvae runs/base/dvae --output runs/base/start
    python scripts/train.py --config configs/small_base.yaml
    python scripts/make_demo_base.py ship --run runs/base/gpt --output examples/demo_base

`start` puts together what a GPT needs to be trained from random weights: its sizes, a tokenizer of the corpus' texts,
and the DVAE and mel norms that scripts/train_dvae.py made. `ship` stores the trained weights in half precision.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from tortoise_hf.cli import run
from tortoise_hf.errors import UserError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

VOCAB_SIZE = 256
"""Text ids at most: the corpus has some 250 different words, and most of them become one id or two."""
GPT_SIZES = {"num_layers": 6, "hidden_size": 256, "num_heads": 4, "num_conditioning_layers": 2}
"""5.9 million parameters: 12 MB in half precision."""
FINE_TUNING_DROPOUT = 0.1
"""In the shipped config, as in the released model's: each of a few clips is seen more often than in a corpus."""
COMPANIONS = ("tokenizer.json", "mel_norms.safetensors", "dvae")
"""What a base holds besides the GPT."""


def start(corpus: Path, dvae: Path, output: Path, overwrite: bool = False) -> str:
    """Write a base without weights: config.json, tokenizer.json, mel_norms.safetensors and dvae/.

    Args:
        corpus: folder in LJSpeech's layout.
        dvae: folder that scripts/train_dvae.py wrote.
        output: the base's folder.
        overwrite: replace these files in a folder that isn't empty.

    Returns:
        What came out, in a line.

    Raises:
        UserError: if an input is missing, or `output` isn't empty and may not be overwritten.
    """
    from tortoise_hf.config import DataConfig
    from tortoise_hf.data.ljspeech import read_rows
    from tortoise_hf.models.dvae import DVAEConfig
    from tortoise_hf.models.gpt import GPTConfig
    from tortoise_hf.text import train_tokenizer

    _check_output(output, overwrite)
    for name in COMPANIONS[1:]:
        if not (dvae / name).exists():
            raise UserError(f"{dvae} holds no {name}; make it with scripts/train_dvae.py --training.output_dir {dvae}.")
    raw = read_rows(DataConfig(root=str(corpus)))
    tokenizer = train_tokenizer(raw.train["text"], VOCAB_SIZE)
    num_codes = DVAEConfig.from_pretrained(dvae / "dvae").num_codes
    config = GPTConfig(num_text_tokens=tokenizer.vocab_size, num_mel_codes=num_codes, dropout=0.0, **GPT_SIZES)

    output.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(output)
    tokenizer.save(output / "tokenizer.json")
    _copy(dvae, output, COMPANIONS[1:])
    return f"{output}: {tokenizer.vocab_size} text ids from {len(raw.train):,} transcripts, {num_codes} mel codes"


def ship(trained: Path, output: Path, overwrite: bool = False) -> str:
    """Store a run's exported weights in half precision, beside what belongs to them.

    Args:
        trained: folder of a run that has ended.
        output: the base's folder.
        overwrite: replace these files in a folder that isn't empty.

    Returns:
        What came out, in a line.

    Raises:
        UserError: if there is no export, or `output` isn't empty and may not be overwritten.
    """
    import torch

    from tortoise_hf.models.dvae import DVAE
    from tortoise_hf.models.gpt import TortoiseGPT
    from tortoise_hf.run import EXPORT_DIR

    _check_output(output, overwrite)
    export = trained / EXPORT_DIR
    missing = [name for name in ("model.safetensors", *COMPANIONS) if not (export / name).exists()]
    if missing:
        raise UserError(f"{export} holds no {missing[0]}; give the folder of a finished run on a base of your own.")
    model = TortoiseGPT.from_pretrained(export, dtype=torch.float16)
    model.config.dropout = FINE_TUNING_DROPOUT
    model.save_pretrained(output)
    _copy(export, output, ("tokenizer.json", "mel_norms.safetensors"))
    DVAE.from_pretrained(export / "dvae", dtype=torch.float16).save_pretrained(output / "dvae")
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{output}: {parameters / 1e6:.1f} million parameters, {size / 1e6:.1f} MB with its DVAE"


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is not a folder; name another one.")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise UserError(f"{output} is not empty; name another folder, or add --overwrite to replace the base in it.")


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / name, target / name)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, do the step it names, say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    first = steps.add_parser("start", help="put together a base to train from random weights")
    first.add_argument("--corpus", type=Path, required=True, help="folder in LJSpeech's layout")
    first.add_argument("--dvae", type=Path, required=True, help="folder that scripts/train_dvae.py wrote")
    last = steps.add_parser("ship", help="store the trained base in half precision")
    last.add_argument("--run", type=Path, required=True, help="folder of the finished run")
    for step in (first, last):
        step.add_argument("--output", type=Path, default=EXAMPLES / "demo_base", help="folder to write")
        step.add_argument("--overwrite", action="store_true", help="replace the base in a folder that is not empty")
    args = parser.parse_args(argv)
    if args.step == "start":
        run(lambda: print(start(args.corpus, args.dvae, args.output, args.overwrite)))
    else:
        run(lambda: print(ship(args.run, args.output, args.overwrite)))


if __name__ == "__main__":
    main()
