"""Read a list file: which clip, which words.

People write these lists in a dozen ways: LJSpeech's `id|transcript|normalized transcript`, `id|transcript`,
DL-Art-School's `wavs/a.wav|transcript`, with or without a header, with tabs, with a BOM, with Windows line ends.
Separator and columns are decided once for the whole file, never line by line, so that a stray `|` in a transcript is
noticed instead of read as one more column.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tortoise_hf.errors import UserError

_WORDS = "text|transcript|transcription|sentence"
HEADER_ROLES = {
    "audio": re.compile(r"(audio|file|wav)(_(file|file_?name|file_?path|name|path))?|filename|filepath|path"),
    "id": re.compile(r"((clip|utterance|utt)_)?id|clip|utterance|name"),
    "raw": re.compile(rf"raw|(raw_)?({_WORDS})"),
    "normalized": re.compile(rf"normali[sz]ed(_({_WORDS}))?|text_normali[sz]ed|clean_text"),
    "speaker": re.compile("(speaker|spk)(_(id|name))?"),
}
"""What the column names of a header mean, spaces and dashes read as underscores. An id counts where no column says
where the file is; other columns are left alone."""

EXAMPLE_LINE = "wavs/clip_001.wav|What is said in the clip."
"""A line every reader understands, for error messages."""


@dataclass(frozen=True)
class ListLine:
    """One line of a list file."""

    row: int
    """Line number, from 1."""
    audio: str
    """The clip as written: an id or a path."""
    text: str
    speaker: str = ""
    detail: str = ""
    """Why the line can't be read, or ""."""


@dataclass(frozen=True)
class _Table:
    """A list file cut into lines and fields."""

    path: Path
    separator: str
    header: list[str] | None
    lines: list[tuple[int, list[str]]]
    """(line number, fields) of every line that isn't blank, header excluded."""


def read_list(
    path: Path, metadata_text: Literal["normalized", "raw"] = "normalized", like: Path | None = None
) -> list[ListLine]:
    """Read a list file into one `ListLine` per line; blank lines and a header are left out.

    Without a header two columns are clip and transcript, three are clip, raw and normalized transcript, as in LJSpeech.
    A line with another number of columns than most lines of the file comes back with `detail` set.

    Args:
        path: UTF-8 text, columns divided by `|` or tabs, where quotes have no meaning; commas (with quotes around
            fields that need them) divide columns under a header such as `file_name,text`.
        metadata_text: which of two transcripts counts.
        like: the training list, when `path` is the evaluation list. A short list may be all stray `|`; its number of
            columns is taken from `like` if that fits any of its lines.

    Raises:
        UserError: if the file isn't UTF-8, is empty, or its columns can't be told.
    """
    table = _split_table(path)
    if not table.lines:
        raise UserError(f"{path} holds no clips; write one line per clip, for instance: {EXAMPLE_LINE}")
    if table.header is not None:
        return _read_with_header(table, metadata_text)
    num_columns = _usual_num_columns(table)
    if like is not None and like != path:
        model = _split_table(like)
        counts = {len(fields) for _, fields in table.lines}
        if model.header is None and model.separator == table.separator and model.lines:
            model_columns = _usual_num_columns(model)
            if model_columns in counts or len(table.lines) == 1:
                num_columns = model_columns
    return _read_without_header(table, num_columns, metadata_text)


def looks_like_list(path: Path) -> bool:
    """Whether most of the first lines hold a `|` or a tab, or the first is a header, so that `path` may be a list."""
    with path.open("rb") as file:
        head = file.read(65_536)
    if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return False
    lines = [line for line in head.replace(b"\0", b"").split(b"\n") if line.strip()][:20]
    if not lines:
        return False
    has_header = _is_header(lines[0].decode("utf-8-sig", errors="replace").split(","))
    return has_header or 2 * sum(b"|" in line or b"\t" in line for line in lines) > len(lines)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); check that it is a file you may open.") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding, found = "UTF-16", "it starts with a UTF-16 mark"
    elif b"\0" in data[:4096]:
        # Latin letters in UTF-16: the other byte of each is 0, the second one if little-endian.
        encoding = "UTF-16LE" if data[1::2].count(0) >= data[::2].count(0) else "UTF-16BE"
        found = f"it has zero bytes, as {encoding} does"
    else:
        try:
            # A mark may also stand inside, where files were joined; it is never part of the words.
            return data.decode("utf-8").replace("\ufeff", "")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            encoding, found = "WINDOWS-1252", f"byte 0x{data[error.start]:02x} in line {line}"
    raise UserError(
        f"{path} is not UTF-8 ({found}); convert it, for instance with: "
        f'iconv -f {encoding} -t UTF-8 "{path.name}" > converted.txt, and put the result in its place.'
    )


def _split_table(path: Path) -> _Table:
    # Only real line ends count: str.splitlines would also cut at characters like U+2028 inside a transcript.
    text = _read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    separator = _separator(path, lines)
    if separator == ",":
        rows = _split_commas(path, text)
    else:
        rows = [(number, [field.strip() for field in line.split(separator)]) for number, line in lines]
    header = None
    if rows and _is_header(rows[0][1]):
        header, rows = [_column_name(field) for field in rows[0][1]], rows[1:]
    # A separator at the end of every line opens a column that isn't one.
    while rows and all(len(fields) > 2 and not fields[-1] for _, fields in rows) and (not header or not header[-1]):
        rows = [(number, fields[:-1]) for number, fields in rows]
        header = header[:-1] if header else header
    return _Table(path, separator, header, rows)


def _separator(path: Path, lines: list[tuple[int, str]]) -> str:
    if not lines:
        return "|"
    first_number, first = lines[0]
    # Commas are part of every other sentence: they divide columns only where a header says so.
    if not {"|", "\t"} & set(first) and _is_header(first.split(",")):
        return ","
    with_bar = sum("|" in line for _, line in lines)
    with_tab = sum("\t" in line for _, line in lines)
    if not with_bar and not with_tab:
        raise UserError(
            f'{path} line {first_number} holds no "|": {_shorten(first)!r}. Write one line per clip, '
            f"for instance: {EXAMPLE_LINE}"
        )
    return "\t" if with_tab > with_bar else "|"


def _split_commas(path: Path, text: str) -> list[tuple[int, list[str]]]:
    # Here, and only here, quotes have a meaning: without them a transcript couldn't hold a comma.
    rows, start = [], 1
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                rows.append((start, [field.strip() for field in fields]))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path} line {start} can't be cut at its commas ({error}); put \" around a text that holds commas, and "
            'write a " inside such a text twice.'
        ) from error
    return rows


def _is_header(fields: list[str]) -> bool:
    roles = {_role(_column_name(field)) for field in fields}
    return bool(roles & {"audio", "id"}) and bool(roles & {"raw", "normalized"})


def _column_name(field: str) -> str:
    return re.sub(r"[\s_-]+", "_", field.strip().strip('"').lower())


def _role(name: str) -> str:
    return next((role for role, names in HEADER_ROLES.items() if names.fullmatch(name)), "")


def _usual_num_columns(table: _Table) -> int:
    counts = Counter(len(fields) for _, fields in table.lines)
    # Among equally frequent counts the smaller one: a "|" too many is likelier than a column too few.
    return min(counts, key=lambda count: (-counts[count], count))


def _read_with_header(table: _Table, metadata_text: str) -> list[ListLine]:
    places: dict[str, int] = {}
    for index, name in enumerate(table.header):
        places.setdefault(_role(name), index)
    raw, normalized = places.get("raw"), places.get("normalized")
    wanted, other = (normalized, raw) if metadata_text == "normalized" else (raw, normalized)
    text = other if wanted is None else wanted
    audio = places["audio"] if "audio" in places else places["id"]
    return [
        _read_line(table, number, fields, len(table.header), audio, text, places.get("speaker"))
        for number, fields in table.lines
    ]


def _read_without_header(table: _Table, num_columns: int, metadata_text: str) -> list[ListLine]:
    if num_columns not in (2, 3):
        found = f"{num_columns} columns" if num_columns > 1 else "a single column"
        raise UserError(
            f"{table.path} has {found} in most lines; expected clip|text or id|raw text|normalized text. If there are "
            "other columns, name them all in a first line such as: audio_file|text|speaker"
        )
    if num_columns == 3:
        _refuse_speaker_column(table)
    text = 1 if num_columns == 2 or metadata_text == "raw" else 2
    return [_read_line(table, number, fields, num_columns, 0, text, None) for number, fields in table.lines]


def _refuse_speaker_column(table: _Table) -> None:
    # clip|text|speaker and clip|speaker|text without a header would train on "speaker_1" as a transcript, or lose the
    # speakers. Names repeat, transcripts hardly do.
    rows = [fields for _, fields in table.lines if len(fields) == 3]
    second, third = ({fields[index] for fields in rows} for index in (1, 2))
    for few, many, place, header in (
        (third, second, "third", "audio_file|text|speaker"),
        (second, third, "second", "audio_file|speaker|text"),
    ):
        if len(rows) >= 4 and 2 * len(few) <= len(rows) and 2 * len(few) < len(many):
            raise UserError(
                f"{table.path} has three columns and the {place} one repeats itself ({_shorten(min(few))!r}), as a "
                f"speaker's name would; name the columns in a first line, for instance: {header}"
            )


def _read_line(
    table: _Table, number: int, fields: list[str], num_columns: int, audio: int, text: int, speaker: int | None
) -> ListLine:
    def field(index: int | None) -> str:
        return fields[index] if index is not None and index < len(fields) else ""

    if len(fields) == num_columns:
        detail = "" if field(audio) else f"line {number} names no clip; write its id or path in column {audio + 1}"
        if "\0" in field(audio):
            detail = f"line {number} holds a zero byte, which no path can"
        return ListLine(number, field(audio), field(text), field(speaker), detail)
    shown = {"\t": "tabs", ",": "commas"}.get(table.separator, '"|"')
    advice = f"remove the surplus {shown} from the transcript" if len(fields) > num_columns else "add what is missing"
    # The text is kept as written: in which column it belongs is exactly what can't be told.
    rest = table.separator.join(fields[1:])
    detail = f"line {number} has {len(fields)} columns divided by {shown}, expected {num_columns}; {advice}"
    return ListLine(number, field(audio) if audio == 0 else "", rest, "", detail)


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
