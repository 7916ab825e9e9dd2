"""Read a dataset in any of the forms people call "LJSpeech" into rows.

A folder with list files and recordings, an archive of such a folder, or a dataset on the Hub: `read_rows` returns the
same columns for all of them. No audio is opened here; `check.py` does that.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from tortoise_hf.config import DataConfig
from tortoise_hf.data.archive import is_archive, unpack
from tortoise_hf.data.discover import AUDIO_EXTENSIONS, LIST_EXTENSIONS, find_lists
from tortoise_hf.data.hub import fetch_loose_files, is_hub_id, read_hub_rows
from tortoise_hf.data.lists import ListLine, looks_like_list, read_list
from tortoise_hf.data.rows import RawData, Row, mark_clips_held_out, rows_to_dataset
from tortoise_hf.errors import UserError

ARCHIVE_DEPTH = 3
"""How many folders deep in an archive the list may lie."""


def read_rows(cfg: DataConfig) -> RawData:
    """Read the training rows and, if there is a list or split for them, the evaluation rows.

    Every line of a list becomes one row, in file order; one that can't be used says so in `problem`. A clip that stands
    in both lists is kept for evaluation, and its training row marked "duplicate_id".

    Raises:
        UserError: if the place doesn't exist, holds no list, or a list can't be read as a whole.
    """
    try:
        return _read_place(cfg)
    except OSError as error:
        where = error.filename or cfg.root
        raise UserError(
            f"data.root: {where} can't be read ({error.strerror or error}); check its permissions and the disk."
        ) from error


def _read_place(cfg: DataConfig) -> RawData:
    place = Path(cfg.root).expanduser()
    if place.is_dir():
        root, train_list = place, cfg.train_list
    elif place.is_file() and is_archive(place):
        root, train_list = _dataset_folder(unpack(place, Path(cfg.cache_dir).expanduser()), cfg), cfg.train_list
    elif place.is_file():
        root, train_list = place.parent, _list_given_as_root(place, cfg)
    elif is_hub_id(cfg.root):
        folder = fetch_loose_files(cfg)
        if folder is None:
            return read_hub_rows(cfg)
        root, train_list = _dataset_folder(folder, cfg), cfg.train_list
    else:
        raise UserError(
            f"data.root: there is no folder or archive {place.absolute()}; give the folder that holds metadata.csv and "
            "wavs, an archive of it, or the id of a dataset on the Hub (owner/name)."
        )
    if train_list is None and not find_lists(root).any() and _holds_parquet(root):
        return read_hub_rows(dataclasses.replace(cfg, root=str(root.resolve())))
    raw = _read_folder(root, train_list, cfg)
    return dataclasses.replace(raw, source=raw.source.replace(str(root), str(place), 1)) if is_archive(place) else raw


def _read_folder(root: Path, train_list: str | None, cfg: DataConfig) -> RawData:
    lists = find_lists(root)
    train_path = _given_list(root, train_list, "train_list") if train_list else lists.choose_train()
    eval_path = _given_list(root, cfg.eval_list, "eval_list") if cfg.eval_list else lists.choose_eval(train_path)
    if eval_path is not None and eval_path.resolve() == train_path.resolve():
        raise UserError(
            f"data.train_list and data.eval_list are both {eval_path}; leave data.eval_list out and clips are split "
            "off for evaluation."
        )
    audio = AudioFolder(root, cfg.allow_outside)
    for path in (train_path, eval_path):
        if path is not None and not audio.may_read(path):
            raise UserError(
                f"the list {path} leads out of the dataset folder to {path.resolve()}; copy it into the folder, or "
                "allow this with --data.allow_outside true."
            )
    train = [audio.row(line, train_path) for line in read_list(train_path, cfg.metadata_text)]
    held_out = None
    if eval_path is not None:
        held_out = [audio.row(line, eval_path) for line in read_list(eval_path, cfg.metadata_text, like=train_path)]
        mark_clips_held_out(train, held_out)
    names = train_path.name if eval_path is None else f"{train_path.name} and {eval_path.name}"
    return RawData(
        train=rows_to_dataset(train),
        eval=None if held_out is None else rows_to_dataset(held_out),
        root=root.resolve(),
        source=f"{root} ({names})",
    )


class AudioFolder:
    """The recordings of a dataset folder, found by what a list calls them.

    Folders are listed once and links resolved once, so a row costs no file system call.
    """

    def __init__(self, root: Path, allow_outside: bool = False) -> None:
        self.root = Path(os.path.abspath(root))
        self.real_root = os.path.realpath(root)
        self.allow_outside = allow_outside
        self._real_folders: dict[str, str] = {}
        self._listings: dict[str, tuple[str, dict[str, bool]]] = {}

    def may_read(self, path: Path) -> bool:
        """Whether `path`, links resolved, lies in the dataset folder, or needn't."""
        return self.allow_outside or self._is_inside(os.path.realpath(path))

    def row(self, line: ListLine, list_path: Path) -> Row:
        """Turn a line of a list into a row; `problem` is set if it has no usable recording."""
        written = line.audio.replace("\\", "/")
        row = Row(
            clip_id=self._clip_id(written),
            text=line.text,
            speaker=line.speaker,
            audio_path="",
            row=line.row,
            list_name=os.path.relpath(os.path.abspath(list_path), self.root).replace(os.sep, "/"),
        )
        if line.detail:
            row.problem, row.detail = "malformed", line.detail
            return row
        looked_for: list[str] = []
        outside = ""
        for candidate in self._candidates(written, Path(os.path.abspath(list_path)).parent):
            candidate = self._seen_from_root(candidate)
            if not self.allow_outside and not self._is_inside(candidate):
                outside = outside or candidate
                continue
            looked_for.append(candidate)
            name, found = self._find(candidate)
            if found and not self.allow_outside and not self._is_inside(found):
                outside = outside or found
            elif found:
                row.audio_path, row.clip_id = found, self._clip_id(os.path.join(os.path.dirname(candidate), name))
                return row
        if outside:
            row.problem, row.detail = "outside_folder", f"{outside} is outside the dataset folder"
        else:
            row.problem, row.detail = "missing_file", self._missing(looked_for)
        return row

    def _candidates(self, written: str, list_dir: Path) -> list[str]:
        """Absolute paths without `..` the clip may have, with the extension as far as it is written."""
        if os.path.isabs(written):
            return [os.path.normpath(written)]
        folders = [self.root / "wavs", self.root, list_dir, list_dir / "wavs"]
        if ".." in written.split("/"):
            folders = [self.root, list_dir]
        elif written.startswith(("wavs/", "./")):
            folders = [self.root, list_dir, self.root / "wavs"]
        return list(dict.fromkeys(os.path.normpath(os.path.join(folder, written)) for folder in folders))

    def _find(self, candidate: str) -> tuple[str, str]:
        """(name in its folder, resolved path) of the recording `candidate` stands for, or ("", "")."""
        folder, name = os.path.split(candidate)
        real_folder, names = self._listing(folder)
        stem, extension = os.path.splitext(name)
        choices = [name]
        if extension.lower() in AUDIO_EXTENSIONS:
            choices += [stem + extension.lower(), stem + extension.upper()]
        else:
            choices += [name + end for known in AUDIO_EXTENSIONS for end in (known, known.upper())]
        for choice in choices:
            if choice in names:
                path = os.path.join(real_folder, choice)
                return choice, os.path.realpath(path) if names[choice] else path
        return "", ""

    def _listing(self, folder: str) -> tuple[str, dict[str, bool]]:
        """(resolved folder, name of each file in it -> whether that is a link)."""
        if folder not in self._listings:
            real_folder, names = os.path.realpath(folder), {}
            if os.path.isdir(real_folder):
                with os.scandir(real_folder) as entries:
                    names = {entry.name: entry.is_symlink() for entry in entries if _is_file(entry)}
            self._listings[folder] = real_folder, names
        return self._listings[folder]

    def _seen_from_root(self, path: str) -> str:
        """`path`, or the path inside the dataset folder that it stands for: the folder may have several names."""
        if self._is_inside(path):
            return path
        folder, name = os.path.split(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(self._real_folders[folder], name)
        return real if self._is_inside(real) else path

    def _is_inside(self, path: str) -> bool:
        return any(path.startswith(os.path.join(root, "")) for root in (str(self.root), self.real_root))

    def _clip_id(self, path: str) -> str:
        for root in (str(self.root), self.real_root):
            path = path.removeprefix(os.path.join(root, ""))
        path = os.path.normpath(path).replace(os.sep, "/") if path else ""
        stem, extension = os.path.splitext(path)
        return (stem if extension.lower() in AUDIO_EXTENSIONS else path).removeprefix("wavs/")

    def _missing(self, looked_for: list[str]) -> str:
        first = looked_for[0]
        extension = os.path.splitext(first)[1]
        if extension.lower() not in AUDIO_EXTENSIONS:
            others = ", ".join(AUDIO_EXTENSIONS[1:-1]) + f" or {AUDIO_EXTENSIONS[-1]}"
            return f"{first}{AUDIO_EXTENSIONS[0]} ({others}) is missing"
        for candidate in looked_for:
            other, _ = self._find(os.path.splitext(candidate)[0])
            if other:
                return f"{first} is missing, but {other} is there; correct the name in the list"
        return f"{first} is missing"


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads back to itself, or to a disk that doesn't answer
        return False


def _given_list(root: Path, name: str, key: str) -> Path:
    path = root / Path(name).expanduser()
    if path.is_file():
        return path
    lists = find_lists(root)
    there = ", ".join(other.name for other in (*lists.train, *lists.whole, *lists.held_out, *lists.unknown))
    raise UserError(
        f"data.{key}: there is no file {path}; give its path relative to data.root"
        + (f" (lists found there: {there})." if there else ".")
    )


def _list_given_as_root(place: Path, cfg: DataConfig) -> str:
    if place.suffix.lower() in AUDIO_EXTENSIONS:
        raise UserError(
            f"data.root: {place} is a recording; give the folder that holds the recordings and their list metadata.csv."
        )
    if place.suffix.lower() not in LIST_EXTENSIONS and not looks_like_list(place):
        raise UserError(
            f"data.root: {place} is neither a folder, nor a list of clips, nor an archive (.zip, .tar, .tar.gz, .tgz); "
            "give the folder that holds metadata.csv and wavs."
        )
    if cfg.train_list is not None:
        raise UserError(
            f"data.root is the file {place} although data.train_list names a list as well; set data.root to the folder "
            f"{place.parent}."
        )
    return place.name


def _dataset_folder(top: Path, cfg: DataConfig) -> Path:
    """The folder in an unpacked archive that holds the list; `top` itself if that can't be told."""
    level = [top]
    for _ in range(ARCHIVE_DEPTH):
        if cfg.train_list is not None:
            holders = [folder for folder in level if (folder / cfg.train_list).is_file()]
        else:
            holders = [folder for folder in level if find_lists(folder).any()]
        if len(holders) == 1:
            return holders[0]
        if holders:
            break
        level = [path for folder in level for path in sorted(folder.iterdir()) if path.is_dir()]
    # No list anywhere: messages are more helpful about the folder that holds things.
    while not any(path.is_file() for path in top.iterdir()):
        folders = [path for path in top.iterdir() if path.is_dir()]
        if len(folders) != 1 or folders[0].name == "wavs":
            break
        top = folders[0]
    return top


def _holds_parquet(root: Path) -> bool:
    return any(True for pattern in ("*.parquet", "*/*.parquet") for _ in root.glob(pattern))
