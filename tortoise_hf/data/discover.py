"""Which files of a folder are its lists, when the user names none.

The words of a file's name decide: `train.txt`, `metadata_train.csv` or `ljs_audio_text_train_filelist.txt` list
training clips, `val.txt` or `metadata_eval.csv` evaluation clips, `metadata.csv` all clips. Test lists are left alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from tortoise_hf.data.lists import EXAMPLE_LINE, looks_like_list
from tortoise_hf.errors import UserError

AUDIO_EXTENSIONS = (".wav", ".flac", ".mp3", ".ogg", ".opus")
"""Files that count as recordings, in the order they are looked for when a list gives only an id."""
LIST_EXTENSIONS = (".csv", ".txt", ".tsv", ".psv", ".list")
"""Files that may be a list."""

_TRAIN_WORDS = {"train", "training"}
_EVAL_WORDS = {"val", "valid", "validation", "eval", "evaluation", "dev"}
_TEST_WORDS = {"test"}
_LIST_WORDS = {"metadata", "filelist", "list", "transcript", "transcripts", "transcription", "transcriptions"}
_OTHER_WORDS = {"readme", "license", "licence", "copying", "requirements", "changelog"}


@dataclass
class FolderLists:
    """List files of a folder by what they list; names made only of known words come first."""

    root: Path
    train: list[Path] = field(default_factory=list)
    held_out: list[Path] = field(default_factory=list)
    whole: list[Path] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)
    """Files whose names say nothing and whose lines look like a list's."""

    def any(self) -> bool:
        """Whether there is anything to train on."""
        return bool(self.train or self.whole or self.unknown)

    def choose_train(self) -> Path:
        """The training list: `train.txt` and the like, else `metadata.csv` and the like, else the only other list.

        Raises:
            UserError: if there is none, or several are equally good.
        """
        for candidates in (self.train, self.whole, self.unknown):
            if candidates:
                return _only(candidates, "data.train_list")
        raise UserError(self._nothing_found())

    def choose_eval(self, train_path: Path) -> Path | None:
        """The evaluation list, or None.

        Raises:
            UserError: if several are equally good.
        """
        candidates = [path for path in self.held_out if path.resolve() != train_path.resolve()]
        return _only(candidates, "data.eval_list") if candidates else None

    def _nothing_found(self) -> str:
        below = [path for path in sorted(self.root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        for folder in below:
            lists = find_lists(folder)
            if lists.any():
                return (
                    f"{self.root} holds no list of clips, but its folder {folder.name} does; "
                    f"set data.root to {self.root / folder.name}."
                )
        if self.held_out:
            return (
                f"{self.root} holds only a list for evaluation ({self.held_out[0].name}); add train.txt beside it, "
                "or name the training list with --data.train_list."
            )
        recording = _first_recording([self.root, *below])
        if recording is not None and find_lists(self.root.parent).any():
            return (
                f"{self.root} holds recordings but no list of what is said in them; the folder it lies in has one: set "
                f"data.root to {self.root.parent}."
            )
        if recording is not None:
            line = f"{recording.relative_to(self.root).as_posix()}|What is said in the clip."
            return (
                f"{self.root} holds recordings but no list of what is said in them; write {self.root / 'metadata.csv'} "
                f"with one line per clip, for instance: {line}"
            )
        return (
            f"{self.root} holds neither a list of clips nor recordings; expected metadata.csv (or train.txt) with "
            f"lines such as {EXAMPLE_LINE} and the folder wavs."
        )


def find_lists(root: Path) -> FolderLists:
    """Sort the files directly in `root` by what their names say they list."""
    lists = FolderLists(root)
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in LIST_EXTENSIONS or not path.is_file():
            continue
        words = set(re.split(r"[^a-z]+", path.stem.lower())) - {""}
        if words & (_TEST_WORDS | _OTHER_WORDS):
            continue
        # train.txt is a list even if nothing in it looks like one: then the user wants to hear what is wrong with it.
        if not _is_plain(path) and not looks_like_list(path):
            continue
        if words & _TRAIN_WORDS:
            lists.train.append(path)
        elif words & _EVAL_WORDS:
            lists.held_out.append(path)
        elif words & _LIST_WORDS:
            lists.whole.append(path)
        else:
            lists.unknown.append(path)
    return lists


def _is_plain(path: Path) -> bool:
    words = set(re.split(r"[_\-. ]+", path.stem.lower()))
    return words <= _TRAIN_WORDS | _EVAL_WORDS | _LIST_WORDS


def _only(candidates: list[Path], key: str) -> Path:
    plain = [path for path in candidates if _is_plain(path)] or candidates
    if len(plain) == 1:
        return plain[0]
    names = ", ".join(path.name for path in plain)
    raise UserError(f"{plain[0].parent} holds several lists ({names}); name the one you mean with --{key}.")


def _first_recording(folders: list[Path]) -> Path | None:
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in AUDIO_EXTENSIONS and not path.name.startswith("."):
                return path
    return None
