"""Make the pictures of the documentation.

    python scripts/make_docs_images.py runs/demo --output docs/images

They come out of a finished run with samples, as `make demo` leaves one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tortoise_hf.cli import run
from tortoise_hf.errors import UserError

_LABEL_HEIGHT = 30


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, draw, say what was drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder of the pictures")
    args = parser.parse_args(argv)
    run(lambda: draw(args.run, args.output))


def draw(run_dir: Path, output: Path) -> None:
    """The lengths of the clips, the curve, and a sentence before and after training."""
    from tortoise_hf.data.check import DatasetReport
    from tortoise_hf.histogram import draw_histogram
    from tortoise_hf.hub.curve import draw_curve, read_log
    from tortoise_hf.run import REPORT_NAME

    samples = run_dir / "samples" / "samples.json"
    if not samples.is_file():
        raise UserError(f"{run_dir} is no finished run with samples (no {samples}); finish it, or name another.")
    output.mkdir(parents=True, exist_ok=True)
    report = DatasetReport.from_json((run_dir / REPORT_NAME).read_text(encoding="utf-8"))
    (output / "dataset.png").write_bytes(draw_histogram(report))
    draw_curve(read_log(run_dir / "log.jsonl"), output / "curve.png")
    rows = {"recording": "The recording", "base": "Before training", "tuned": "After training"}
    spoken = json.loads(samples.read_text(encoding="utf-8"))
    sentence = next((one for one in spoken if rows.keys() <= one.keys()), None)
    if sentence is None:
        raise UserError(f"{samples} has no sentence with a recording, so there is nothing to compare with.")
    pictures = [(samples.parent / sentence[role]).with_suffix(".png") for role in rows]
    stack(pictures, [f"{name}: {sentence['text']}" for name in rows.values()], output / "mels.png")
    print(f"Made dataset.png, curve.png and mels.png in {output}.")


def stack(pictures: Sequence[Path], labels: Sequence[str], target: Path) -> None:
    """Put pictures below each other, each under its label."""
    from PIL import Image, ImageDraw, ImageFont

    images = [Image.open(path).convert("RGB") for path in pictures]
    width, height = max(image.width for image in images), sum(image.height + _LABEL_HEIGHT for image in images)
    whole = Image.new("RGB", (width, height), "white")
    pen, y = ImageDraw.Draw(whole), 0
    for image, label in zip(images, labels, strict=True):
        pen.text((8, y + 8), label, fill=(40, 40, 40), font=ImageFont.load_default(15))
        whole.paste(image, (0, y + _LABEL_HEIGHT))
        y += _LABEL_HEIGHT + image.height
    whole.save(target, "PNG", optimize=True)


if __name__ == "__main__":
    main()
