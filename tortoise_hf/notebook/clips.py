"""A few recordings to listen to."""

from __future__ import annotations

import io

import soundfile

from tortoise_hf.audio import SAMPLE_RATE, AudioError, load_waveform
from tortoise_hf.config import DataConfig
from tortoise_hf.data.check import DatasetReport
from tortoise_hf.data.ljspeech import read_rows

CLIPS_PLAYED = 4


def some_clips(cfg: DataConfig, found: DatasetReport) -> list[tuple[str, bytes]]:
    """Texts and sound (WAV files) of a few clips that are used, spread over the list."""
    rows = read_rows(cfg).train
    dropped = {problem.clip_id for problems in found.dropped.values() for problem in problems}
    columns = zip(rows["clip_id"], rows["text"], rows["audio_path"], strict=True)
    usable = [(said, path) for clip, said, path in columns if clip not in dropped and path]
    clips = []
    for said, path in usable[:: max(1, len(usable) // CLIPS_PLAYED)][:CLIPS_PLAYED]:
        try:
            waveform = load_waveform(path)
        except AudioError:  # gone since it was checked
            continue
        stream = io.BytesIO()
        soundfile.write(stream, waveform.numpy(), SAMPLE_RATE, format="WAV")
        clips.append((said, stream.getvalue()))
    return clips
