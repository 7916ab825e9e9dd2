"""Every form of an LJSpeech folder gives the same rows; what can't be used says why."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tortoise_hf.config import DataConfig
from tortoise_hf.data.ljspeech import read_rows
from tortoise_hf.data.rows import ROW_FEATURES
from tortoise_hf.errors import UserError

CLIPS = {"LJ001-0001": "Printing, in the only sense.", "LJ001-0002": "In being modern.", "LJ001.0003": "For 2 men."}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folder with wavs/ of three short clips and no list."""
    (tmp_path / "voice" / "wavs").mkdir(parents=True)
    for clip_id in CLIPS:
        soundfile.write(tmp_path / "voice" / "wavs" / f"{clip_id}.wav", np.zeros(100), 22_050)
    return tmp_path / "voice"


def read(root, tmp_path: Path | None = None, **settings):
    """Rows of a folder, with a cache that nothing else uses."""
    cache_dir = str((tmp_path or Path(root).parent) / "cache")
    return read_rows(DataConfig(root=str(root), cache_dir=cache_dir, **settings))


def write_list(path: Path, line: str, **replacements) -> None:
    """One line per clip of CLIPS; {id} and {text} are filled in."""
    lines = [line.format(id=clip_id, text=text, **replacements) for clip_id, text in CLIPS.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def assert_all_clips(rows, root: Path) -> None:
    assert dict(zip(rows["clip_id"], rows["text"], strict=True)) == CLIPS
    assert rows["audio_path"] == [str((root / "wavs" / f"{clip_id}.wav").resolve()) for clip_id in CLIPS]
    assert set(rows["problem"]) == {""}, rows["detail"]
    assert rows.features == ROW_FEATURES


@pytest.mark.parametrize(
    "line",
    [
        "{id}|as printed|{text}",
        "{id}|{text}",
        "{id}.wav|{text}",
        "wavs/{id}|{text}",
        "wavs/{id}.wav|{text}",
        "./wavs/{id}.wav|{text}",
        "wavs\\{id}.wav|{text}",
        "wavs/{id}.WAV|{text}",
        "wavs/{id}.wav|as printed|{text}",
        " wavs/{id}.wav | {text} ",
        "{id}\t{text}",
        "{id}\tas printed\t{text}",
        "{id}|{text}|",
        "{id}|{text}\r",
        "\n{id}|{text}\n   \n",
    ],
)
@pytest.mark.parametrize("name", ["metadata.csv", "train.txt", "my_clips.txt"])
def test_forms_of_a_line(root, line, name):
    write_list(root / name, line)
    raw = read(root)
    assert_all_clips(raw.train, root)
    assert raw.eval is None
    assert raw.root == root.resolve()
    assert set(raw.train["list_name"]) == {name}


@pytest.mark.parametrize(
    "header, line",
    [
        ("id|transcript|normalised transcript", "{id}|as printed|{text}"),
        ("ID|Transcription|Normalized Transcription", "{id}|as printed|{text}"),
        ("audio_file|text", "wavs/{id}.wav|{text}"),
        ("id|text", "{id}|{text}"),
        ("text|path", "{text}|wavs/{id}.wav"),
        ("file_name\ttranscription", "wavs/{id}.wav\t{text}"),
        ("id|path|duration|sentence", "clip|wavs/{id}.wav|3.5|{text}"),
        ("file_name,transcription", 'wavs/{id}.wav,"{text}"'),
    ],
)
def test_header_names_the_columns_and_is_no_row(root, header, line):
    write_list(root / "metadata.csv", line)
    content = (root / "metadata.csv").read_text()
    (root / "metadata.csv").write_text(f"{header}\n{content}")
    rows = read(root).train
    assert_all_clips(rows, root)
    assert rows["row"] == [2, 3, 4]


def test_byte_order_mark_and_line_separators_inside_text(root):
    text = "one\u2028two\x85three\x0cfour"
    (root / "metadata.csv").write_bytes(f"\ufeffLJ001-0001|{text}\r\n\r\n\ufeffLJ001-0002|five\r\n".encode())
    rows = read(root).train
    assert rows["text"] == [text, "five"]
    assert rows["row"] == [1, 3]
    assert rows["problem"] == ["", ""]


def test_absolute_paths_inside_the_folder(root):
    write_list(root / "train.txt", "{root}/wavs/{id}.wav|{text}", root=root)
    assert_all_clips(read(root).train, root)


def test_relative_root_and_root_behind_a_link(root, tmp_path, monkeypatch):
    write_list(root / "metadata.csv", "{id}|{text}")
    (tmp_path / "link").symlink_to(root)
    assert_all_clips(read(tmp_path / "link", tmp_path).train, root)
    write_list(root / "metadata.csv", "{root}/wavs/{id}.wav|{text}", root=tmp_path / "link")
    assert_all_clips(read(tmp_path / "link", tmp_path).train, root)
    monkeypatch.chdir(tmp_path)
    assert_all_clips(read("voice", tmp_path).train, root)


def test_column_of_a_three_column_list_is_a_choice(root):
    write_list(root / "metadata.csv", "{id}|as printed|{text}")
    assert set(read(root, metadata_text="raw").train["text"]) == {"as printed"}


def test_speakers_come_from_a_named_column_only(root):
    (root / "train.txt").write_text("audio_file|text|speaker_name\nwavs/LJ001-0001.wav|one|anna\nLJ001-0002|two|ben\n")
    assert read(root).train["speaker"] == ["anna", "ben"]
    write_list(root / "train.txt", "{id}|{text}")
    assert set(read(root).train["speaker"]) == {""}


@pytest.mark.parametrize("columns, place", [("{id}|{text}|anna", "third"), ("{id}|anna|{text}", "second")])
def test_speakers_without_a_header_are_not_taken_for_transcripts(root, columns, place):
    lines = [columns.format(id=f"clip{number}", text=f"sentence {number}") for number in range(8)]
    (root / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"{place} one repeats itself \\('anna'\\).*first line"):
        read(root)


@pytest.mark.parametrize(
    "usual, broken, expected",
    [
        ("{id}|{text}", "LJ001-0001|either | or", 2),
        ("wavs/{id}.wav|{text}", "wavs/LJ001-0001.wav|a|b|c", 2),
        ("{id}|{text}|{text}", "LJ001-0001|either | or|either or", 3),
        ("{id}|{text}|{text}", "LJ001-0001|only raw", 3),
        ("{id}|{text}", "LJ001-0001", 2),
        ("{id}|{text}", "|text of nothing", 2),
    ],
)
def test_a_line_with_another_number_of_columns_is_kept_as_a_problem(root, usual, broken, expected):
    write_list(root / "metadata.csv", usual)
    with (root / "metadata.csv").open("a") as file:
        file.write(broken + "\n")
    rows = read(root).train
    assert rows["problem"] == ["", "", "", "malformed"]
    assert rows["audio_path"][3] == ""
    assert "line 4" in rows["detail"][3]
    if broken.count("|") != expected - 1:
        assert f"{broken.count('|') + 1} columns" in rows["detail"][3]
        assert f"expected {expected}" in rows["detail"][3]
    if broken.count("|") >= expected:
        assert 'remove the surplus "|"' in rows["detail"][3]


def test_where_counts_are_even_the_bar_too_many_is_the_mistake(root):
    (root / "train.txt").write_text("wavs/LJ001-0001.wav|one\nwavs/LJ001-0002.wav|either | or\n")
    assert read(root).train["problem"] == ["", "malformed"]


def test_a_single_evaluation_line_with_a_bar_is_measured_by_the_training_list(root):
    write_list(root / "train.txt", "wavs/{id}.wav|{text}")
    (root / "val.txt").write_text("wavs/LJ001-0001.wav|either | or\n")
    assert read(root).eval["problem"] == ["malformed"]


@pytest.mark.parametrize(
    "train, held_out",
    [
        ("train.txt", "val.txt"),
        ("metadata_train.csv", "metadata_val.csv"),
        ("metadata_train.csv", "metadata_eval.csv"),
        ("train.csv", "validation.csv"),
        ("Train.txt", "eval.txt"),
        ("ljs_audio_text_train_filelist.txt", "ljs_audio_text_val_filelist.txt"),
        ("metadata.csv", "val.txt"),
    ],
)
def test_pairs_of_lists_are_found(root, train, held_out):
    (root / train).write_text("wavs/LJ001-0001.wav|one\nwavs/LJ001-0002.wav|two\n")
    (root / held_out).write_text("wavs/LJ001.0003.wav|three\n")
    (root / "ljs_audio_text_test_filelist.txt").write_text("wavs/LJ001-0002.wav|two\n")
    (root / "README.txt").write_text("id|text is how lines look\n")
    raw = read(root)
    assert (raw.train["text"], raw.eval["text"]) == (["one", "two"], ["three"])
    assert (set(raw.train["list_name"]), set(raw.eval["list_name"])) == ({train}, {held_out})
    assert train in raw.source
    assert held_out in raw.source


def test_test_lists_and_notes_are_no_candidates(root):
    write_list(root / "my_clips.txt", "{id}|{text}")
    for name in ("test.txt", "metadata_test.csv", "README.txt", "LICENSE.txt", ".hidden.csv"):
        write_list(root / name, "{id}|{text}")
    raw = read(root)
    assert set(raw.train["list_name"]) == {"my_clips.txt"}
    assert raw.eval is None


def test_training_list_goes_before_the_list_of_all_clips(root):
    write_list(root / "metadata.csv", "{id}|{text}")
    (root / "train.txt").write_text("LJ001-0001|one\n")
    (root / "val.txt").write_text("LJ001-0002|two\n")
    assert read(root).train["text"] == ["one"]


def test_a_clip_of_both_lists_is_held_out(root):
    write_list(root / "metadata.csv", "{id}|{text}")
    (root / "val.txt").write_text("wavs/LJ001-0002.wav|two\n")
    raw = read(root)
    assert raw.train["problem"] == ["", "duplicate_id", ""]
    assert "val.txt line 1" in raw.train["detail"][1]
    assert raw.eval["problem"] == [""]


def test_lists_named_by_the_user(root):
    (root / "lists").mkdir()
    write_list(root / "lists" / "mine.lst", "../wavs/{id}.wav|{text}")
    (root / "held.txt").write_text("LJ001-0001|one\n")
    raw = read(root, train_list="lists/mine.lst", eval_list="held.txt")
    assert raw.train["clip_id"] == list(CLIPS)
    assert set(raw.train["list_name"]) == {"lists/mine.lst"}
    assert raw.eval["text"] == ["one"]


def test_root_may_be_the_list_itself(root):
    write_list(root / "mine.txt", "{id}|{text}")
    write_list(root / "other.txt", "{id}|{text}")
    assert_all_clips(read(root / "mine.txt", root.parent).train, root)


def test_audio_is_found_by_id(root):
    (root / "flat.flac").touch()
    (root / "wavs" / "both.ogg").touch()
    (root / "wavs" / "both.flac").touch()
    (root / "speaker" / "a").mkdir(parents=True)
    (root / "speaker" / "a" / "deep.MP3").touch()
    (root / "metadata.csv").write_text("flat|one\nboth|two\nspeaker/a/deep|three\n")
    rows = read(root).train
    assert [os.path.relpath(path, root) for path in rows["audio_path"]] == [
        "flat.flac",
        "wavs/both.flac",
        "speaker/a/deep.MP3",
    ]
    assert rows["clip_id"] == ["flat", "both", "speaker/a/deep"]


def test_equal_names_in_two_folders_are_two_clips(root):
    for speaker in ("anna", "ben"):
        (root / speaker).mkdir()
        (root / speaker / "1.wav").touch()
    (root / "train.txt").write_text("anna/1.wav|one\nben/1.wav|two\n")
    assert read(root).train["clip_id"] == ["anna/1", "ben/1"]


@pytest.mark.parametrize(
    "written, looked_for",
    [("gone", "wavs/gone.wav"), ("gone.wav", "wavs/gone.wav"), ("wavs/gone.wav", "wavs/gone.wav")],
)
def test_missing_audio_says_where_it_was_looked_for(root, written, looked_for):
    write_list(root / "metadata.csv", "{id}|{text}")
    with (root / "metadata.csv").open("a") as file:
        file.write(f"{written}|gone\n")
    rows = read(root).train
    assert rows["problem"] == ["", "", "", "missing_file"]
    assert rows["detail"][3].startswith(str(root / looked_for))
    assert (rows["clip_id"][3], rows["text"][3], rows["audio_path"][3], rows["row"][3]) == ("gone", "gone", "", 4)


def test_a_wrong_extension_is_not_guessed_around(root):
    (root / "wavs" / "a.flac").touch()
    (root / "train.txt").write_text("wavs/a.wav|one\n")
    rows = read(root).train
    assert rows["problem"] == ["missing_file"]
    assert "a.flac is there" in rows["detail"][0]


@pytest.mark.parametrize("way", ["dots", "absolute", "absolute dots", "file link", "folder link", "gone"])
def test_paths_that_leave_the_folder_are_refused_unless_allowed(root, tmp_path, way):
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    shutil.copy(root / "wavs" / "LJ001-0001.wav", outside / "a.wav")
    (root / "wavs" / "link.wav").symlink_to(outside / "a.wav")
    (root / "more").symlink_to(outside)
    written = {
        "dots": "../elsewhere/a.wav",
        "absolute": f"{outside}/a.wav",
        "absolute dots": f"{root}/wavs/../../elsewhere/a.wav",
        "file link": "link",
        "folder link": "more/a.wav",
        "gone": "../elsewhere/gone.wav",
    }[way]
    (root / "train.txt").write_text(f"{written}|one\nLJ001-0001|two\n")
    rows = read(root).train
    assert rows["problem"] == ["outside_folder", ""]
    assert rows["audio_path"][0] == ""
    assert "outside the dataset folder" in rows["detail"][0]
    allowed = read(root, allow_outside=True).train
    assert allowed["problem"][0] == ("missing_file" if way == "gone" else "")
    assert allowed["audio_path"][0] == ("" if way == "gone" else str((outside / "a.wav").resolve()))


def test_a_folder_whose_name_starts_alike_is_outside(root, tmp_path):
    (tmp_path / "voice2").mkdir()
    (tmp_path / "voice2" / "a.wav").touch()
    (root / "train.txt").write_text("../voice2/a.wav|one\n")
    assert read(root).train["problem"] == ["outside_folder"]


def test_links_inside_the_folder_are_fine(root):
    (root / "audio").symlink_to(root / "wavs")
    (root / "wavs" / "again.wav").symlink_to("LJ001-0001.wav")
    (root / "train.txt").write_text("audio/LJ001-0002.wav|one\nagain|two\n")
    rows = read(root).train
    assert rows["problem"] == ["", ""]
    assert [Path(path).name for path in rows["audio_path"]] == ["LJ001-0002.wav", "LJ001-0001.wav"]


def test_a_list_that_is_a_link_to_elsewhere_is_refused_unless_allowed(root, tmp_path):
    write_list(tmp_path / "secret.txt", "{id}|{text}")
    (root / "train.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match=r"leads out of the dataset folder.*--data\.allow_outside true"):
        read(root)
    assert_all_clips(read(root, allow_outside=True).train, root)
    (root / "train.txt").unlink()
    with pytest.raises(UserError, match="leads out of the dataset folder"):
        read(root, train_list="../secret.txt")


@pytest.mark.parametrize("problem_line", ["LJ001-0001|again", "LJ001-0001|"])
def test_repeated_ids_and_empty_texts_stay_rows(root, problem_line):
    write_list(root / "metadata.csv", "{id}|{text}")
    with (root / "metadata.csv").open("a") as file:
        file.write(problem_line)
    rows = read(root).train
    assert len(rows) == 4
    assert rows["clip_id"][3] == "LJ001-0001"


@pytest.mark.parametrize(
    "content, advice",
    [
        (
            "LJ001-0001|café\n".encode("latin-1"),
            r"byte 0xe9 in line 1.*iconv -f WINDOWS-1252 -t UTF-8 \"metadata.csv\"",
        ),
        ("a|one\nb|two\nc|“three”\n".encode("cp1252"), "in line 3.*iconv"),
        ("LJ001-0001|text\n".encode("utf-16"), "iconv -f UTF-16 "),
        ("LJ001-0001|text\n".encode("utf-16-le"), "iconv -f UTF-16LE "),
        ("LJ001-0001|text\n".encode("utf-16-be"), "iconv -f UTF-16BE "),
        (b"", r"holds no clips.*wavs/clip_001\.wav\|"),
        (b"\n \n", "holds no clips"),
        (b"audio_file|text\n", "holds no clips"),
        (b"LJ001-0001 some words\n", r'line 1 holds no "\|".*for instance: wavs/clip_001\.wav\|'),
        (b"a|b|c|d\ne|f|g|h\n", r"4 columns.*audio_file\|text\|speaker"),
    ],
)
def test_lists_that_cant_be_read_say_what_to_do(root, content, advice):
    (root / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError, match=advice) as caught:
        read(root)
    assert str(root / "metadata.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_places_that_hold_nothing_say_what_to_do(root, tmp_path):
    with pytest.raises(UserError, match=r"no folder or archive .*/nowhere; give the folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"recordings but no list.*wavs/LJ001-0001\.wav\|What is said"):
        read(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither a list of clips nor recordings.*metadata\.csv"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="is a recording; give the folder"):
        read(root / "wavs" / "LJ001-0001.wav")
    (tmp_path / "metadata.csv").write_text("LJ001-0001|Hello.\n")
    with pytest.raises(UserError, match=rf"the folder it lies in has one: set data\.root to {tmp_path}\."):
        read(root)
    (tmp_path / "metadata.csv").unlink()
    write_list(root / "val.txt", "{id}|{text}")
    with pytest.raises(UserError, match="only a list for evaluation"):
        read(root)
    write_list(root / "metadata.csv", "{id}|{text}")
    with pytest.raises(UserError, match=f"its folder voice does; set data.root to {root}"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"no file .*lists found there: metadata\.csv, val\.txt"):
        read(root, train_list="tain.txt")
    with pytest.raises(UserError, match="are both"):
        read(root, train_list="metadata.csv", eval_list="metadata.csv")
    write_list(root / "list.txt", "{id}|{text}")
    with pytest.raises(UserError, match=r"several lists \(list\.txt, metadata\.csv\).*--data\.train_list"):
        read(root)


def test_the_demo_voice_is_read(repository):
    raw = read_rows(DataConfig(root=str(repository / "examples" / "demo_voice")))
    assert len(raw.train) >= 60
    assert set(raw.train["problem"]) == {""}


def test_commas_divide_columns_only_under_a_header_and_quotes_are_checked(root):
    (root / "metadata.csv").write_text(
        'file_name,text\nLJ001-0001.wav,"one\n2, ""three"""\nLJ001-0002.wav,four, five\n'
    )
    rows = read(root).train
    assert rows["text"] == ['one\n2, "three"', "four,five"]
    assert rows["row"] == [2, 4]
    assert rows["problem"] == ["", "malformed"]
    (root / "metadata.csv").write_text('file_name,text\nLJ001-0001.wav,"one\nLJ001-0002.wav,two\n')
    with pytest.raises(UserError, match=r"line 2 can't be cut at its commas"):
        read(root)


def test_random_damage_never_ends_in_a_traceback(root):
    write_list(root / "metadata.csv", "wavs/{id}.wav|{text}")
    whole = (root / "metadata.csv").read_bytes()
    pieces = [
        b"|",
        b"\t",
        b"\n",
        b"\r",
        b"\0",
        b"..",
        b"/",
        b"\\",
        b"\xff",
        b'"',
        b"~",
        b" ",
        b"\xe2\x80\xa8",
        b"x" * 300,
    ]
    draw = random.Random(0)
    read_whole = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            place = draw.randrange(len(data))
            data[place : place + draw.randrange(3)] = draw.choice(pieces)
        (root / "metadata.csv").write_bytes(bytes(data))
        try:
            rows = read(root).train
        except UserError:
            continue
        read_whole += 1
        for row in rows:
            assert bool(row["audio_path"]) != bool(row["problem"])
            assert bool(row["detail"]) == bool(row["problem"])
            assert row["problem"] in ("", "malformed", "missing_file", "outside_folder")
    assert read_whole > 50
