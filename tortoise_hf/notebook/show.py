"""What the cells show, as HTML that Colab, Kaggle, Jupyter and VS Code draw alike: tables, pictures, players."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tortoise_hf.units import format_seconds

if TYPE_CHECKING:
    from tortoise_hf.data.check import DatasetReport
    from tortoise_hf.plan import Plan

_LEFT = 'style="text-align:left; white-space:normal"'
ROWS_PER_REASON = 3


class Panel:
    """A place in a cell's output whose content is replaced."""

    def __init__(self) -> None:
        """Empty for now."""
        from IPython.display import HTML, display

        self._html = HTML
        self._content = ""
        self._handle = display(HTML(""), display_id=True)

    def show(self, content: str) -> None:
        """Put HTML there, unless it is there."""
        if content != self._content:
            self._content = content
            self._handle.update(self._html(content))


def show(content: str) -> None:
    """Add HTML to the cell's output."""
    from IPython.display import HTML, display

    display(HTML(content))


def text(lines: str) -> str:
    """Lines as they are, broken where the page ends."""
    style = "white-space:pre-wrap; word-break:normal; overflow-wrap:anywhere; margin:0"
    return f'<pre style="{style}">{html.escape(lines)}</pre>'


def name_of(setting: str) -> str:
    """A setting's name, which may be broken behind its dots and underscores where a table is narrow."""
    return f'<code style="white-space:normal">{setting.replace(".", ".<wbr>").replace("_", "_<wbr>")}</code>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th {_LEFT}>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td {_LEFT}>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def picture(png: bytes, label: str) -> str:
    """A PNG that never is wider than the page."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img style="max-width:100%; height:auto" alt="{html.escape(label)}" src="data:image/png;base64,{data}">'


def player(wav: bytes) -> str:
    """Plays a WAV file."""
    data = base64.b64encode(wav).decode("ascii")
    style = "width:16em; max-width:20vw"  # on a phone three of them stand side by side, with little but their button
    return f'<audio controls preload="none" style="{style}" src="data:audio/wav;base64,{data}"></audio>'


def report(found: DatasetReport, histogram: bytes, clips: Sequence[tuple[str, bytes]]) -> str:
    """What the check of the recordings found, with a few of them (text, WAV) to listen to."""
    from tortoise_hf.data.check import ADVICE

    parts = [text(found.summary().splitlines()[0]), picture(histogram, "how many clips last how long")]
    if found.dropped:
        rows = []
        for reason, problems in sorted(found.dropped.items(), key=lambda item: -len(item[1])):
            examples = [html.escape(found.describe(problem)) for problem in problems[:ROWS_PER_REASON]]
            more = len(problems) - len(examples)
            examples += [f"and {more:,} more"] if more else []
            advice = html.escape(ADVICE[reason])
            rows.append((reason.replace("_", " "), f"{len(problems):,}", "<br>".join(examples), advice))
        parts.append(table(("left out", "clips", "which", "what to do"), rows))
    parts += [text(f"Warning: {warning}") for warning in found.warnings]
    if clips:
        parts.append(table(("a few of the clips", ""), [(html.escape(said), player(wav)) for said, wav in clips]))
    return "".join(parts)


def plan(made: Plan) -> str:
    """Every setting with its value and its reason, and what the run will cost."""
    from tortoise_hf.plan import in_words

    rows = [
        (name_of(row.name), f"<b>{html.escape(in_words(row.value))}</b>", html.escape(row.origin)) for row in made.rows
    ]
    after = "\n".join(line.strip() for line in made.closing_lines())
    return text(made.head()) + table(("setting", "value", "why"), rows) + text(after)


def progress(step: int, max_steps: int | None, figures: Mapping[str, float], line: str) -> str:
    """How far a run is: a bar, its last figures, and the line it is at."""
    parts = []
    if max_steps:
        share = 100 * step / max_steps
        parts.append(f'<progress style="width:60%" value="{step}" max="{max_steps}"></progress> ')
        parts.append(f"step {step:,} of {max_steps:,} ({share:.0f} %)<br>")
    words = [f"{name} {figures[key]:.3f}" for key, name in _FIGURES if key in figures]
    if 0 < step < (max_steps or 0) and "eta_seconds" in figures:
        words.append(f"about {format_seconds(figures['eta_seconds'])} left")
    parts.append(html.escape(", ".join(words)))
    return "".join(parts) + text(line)


_FIGURES = (("loss", "training loss"), ("eval_mel_loss", "eval mel loss"))


def curve(log: Sequence[dict[str, Any]]) -> str:
    """The losses over the steps; nothing while there is no line to draw."""
    from tortoise_hf.hub.curve import draw_curve

    if len({entry.get("step") for entry in log}) < 2:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.png"
        return picture(path.read_bytes(), "loss over the optimizer steps") if draw_curve(log, path) else ""


def samples(run_dir: Path) -> str:
    """Every sentence as it was recorded, as it was spoken before training, and as it is now."""
    from tortoise_hf.sample_folder import load_samples

    found = load_samples(run_dir)
    steps = sorted({sample.step for sample in found if sample.step is not None})
    if not steps:
        return ""
    shown = [None, *dict.fromkeys((steps[0], steps[-1]))]
    rows: dict[int, list[str]] = {}
    for number, said in dict.fromkeys((sample.number, sample.text) for sample in found):
        places = {sample.step: sample.path for sample in found if sample.number == number}
        players = [player(places[step].read_bytes()) if step in places else "" for step in shown]
        rows[number] = [html.escape(said), *players]
    names = ["the recording", *(f"step {step:,}" for step in shown[1:])]
    return table(("samples", *names), rows.values())
