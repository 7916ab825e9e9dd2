"""An evaluation from start to end: who speaks what, in which company, and what the measures say of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile

from tortoise_hf.audio import SAMPLE_RATE, num_codes
from tortoise_hf.errors import UserError
from tortoise_hf.evaluation.endings import LengthModel
from tortoise_hf.evaluation.recognition import Recognizer, word_errors
from tortoise_hf.evaluation.recordings import Recording, Recordings
from tortoise_hf.evaluation.repetition import choose_limit, longest_repetition
from tortoise_hf.evaluation.report import Check, Column, Evaluation, Spoken
from tortoise_hf.evaluation.speaker_similarity import SpeakerJudge, SpeakerMeasure
from tortoise_hf.evaluation.speaking import (
    SECONDS_PER_CODE,
    Utterance,
    encode_recordings,
    resynthesize,
    speak_texts,
)
from tortoise_hf.speech import Preset, Progress
from tortoise_hf.voice import Voice

ENROLLED_CLIPS = 20
"""Recordings that the measures learn a voice from, at most. With 5 the spectral measure is nearly as good."""
UNSEEN_CLIPS = 10
"""Recordings of each other voice to check the speaker measure with, at most."""
CALIBRATION_CLIPS = 100
"""Recordings of the speaker that say how long a repetition may be, at most."""
TARGET = "the voice's speaker"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is evaluated, and against what."""

    voices: Mapping[str, Voice]
    """By name, in the order of the columns."""
    texts: Sequence[str]
    recordings: Recordings | None = None
    """Of the speaker; without them likeness and length can't be told."""
    others: Mapping[str, Sequence[Recording]] = field(default_factory=dict)
    """Of other speakers."""
    recognizer: Recognizer | None = None
    measure: SpeakerMeasure | None = None
    preset: Preset
    preview: bool
    seed: int = 0


@dataclass(frozen=True)
class Measures:
    """What the voices that share a DVAE are measured with."""

    judge: SpeakerJudge | None
    lengths: LengthModel | None
    check: Check


def evaluate_voices(
    task: Task,
    folder: Path,
    settings: dict[str, Any],
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> Evaluation:
    """Have voices speak, measure, write the sounds.

    Args:
        task: what is evaluated.
        folder: where the sounds go; it exists.
        settings: what was asked for, to be kept with the figures.
        say: told what is done.
        progress: told of finished samples and diffusion steps.

    Raises: UserError: if a voice can't speak or a recording can't be read.
    """
    measures: dict[str, Measures] = {}
    checks: dict[str, Check] = {}
    columns: list[Column] = []
    for name, voice in task.voices.items():
        channel = "" if task.recordings is None else _channel(voice)
        if channel not in measures:
            measures[channel], company = _keep_company(task, voice, say)
            checks[name] = measures[channel].check
            for kind, utterances in company.items():
                if kind == "resynthesised" or len(measures) == 1:  # the recordings themselves are the same for all
                    suffix = f" by {name}" if len(measures) > 1 else ""
                    columns.append(_judge(task, measures[channel], kind + suffix, kind, utterances, folder, say))
        say(f"{name} speaks {len(task.texts):,} texts")
        spoken = speak_texts(voice, task.texts, task.preset, task.seed, task.preview, progress)
        columns.append(_judge(task, measures[channel], name, "voice", spoken, folder, say))
    order = ("recordings", "resynthesised", "voice")
    columns.sort(key=lambda column: order.index(column.kind))
    said = [each.text for column in columns for each in column.spoken]
    unknown = [] if task.recognizer is None else task.recognizer.unknown_words(said)
    return Evaluation(settings, tuple(columns), checks, tuple(unknown))


def _keep_company(task: Task, voice: Voice, say: Callable[[str], None]) -> tuple[Measures, dict[str, list[Utterance]]]:
    """What the measures learn from recordings, and other recordings, as they are and resynthesised."""
    if task.recordings is None:
        return Measures(None, None, Check(repetition_limit=choose_limit([]))), {}
    known, held_out = task.recordings.known, task.recordings.held_out[: len(task.texts)]
    limited_by = known[:CALIBRATION_CLIPS]
    learnt = {TARGET: len(limited_by)}
    sources = {TARGET: [*limited_by, *held_out]}
    for name, clips in task.others.items():
        sources[name] = list(clips[: ENROLLED_CLIPS + UNSEEN_CLIPS])
        learnt[name] = len(sources[name]) * ENROLLED_CLIPS // (ENROLLED_CLIPS + UNSEEN_CLIPS)
    say(f"Encodes {sum(map(len, sources.values())):,} recordings")
    originals = {name: encode_recordings(voice, clips) for name, clips in sources.items()}
    same_channel = task.preview and task.measure is not None and task.measure.same_channel
    clips = dict(originals)
    if task.preview:
        wanted = originals if same_channel else {TARGET: originals[TARGET]}
        for name, each in wanted.items():
            clips[name] = resynthesize(voice, each, task.preset, task.seed, True, audible=False)
    repetitions = [longest_repetition(each.codes, each.log_mel) for each in clips[TARGET][: learnt[TARGET]]]
    judge = None
    if task.measure is not None:
        heard = clips if same_channel else originals
        judge = SpeakerJudge(
            task.measure,
            TARGET,
            {name: each[: learnt[name]][:ENROLLED_CLIPS] for name, each in heard.items()},
            {name: each[learnt[name] :] for name, each in heard.items()},
        )
    in_codes = [
        num_codes(int(clip.seconds * SAMPLE_RATE)) * SECONDS_PER_CODE for clip in known
    ]  # as outputs are counted
    lengths = LengthModel.fit([clip.text for clip in known], in_codes)
    unseen = originals[TARGET][learnt[TARGET] :]
    say(f"Makes the codes of {len(unseen):,} recordings heard")
    company = {
        "recordings": unseen,
        "resynthesised": resynthesize(voice, unseen, task.preset, task.seed, task.preview),
    }
    check = Check(
        speaker_measure=judge and judge.measure.name,
        speaker_accuracy=judge and judge.accuracy,
        num_voices=len(sources),
        num_unseen=judge.num_unseen if judge else 0,
        learnt_from=None if judge is None else "resynthesised" if same_channel else "recordings",
        other_voices=judge.others if judge else {},
        repetition_limit=choose_limit(repetitions),
        seconds_per_letter=lengths.seconds_per_letter,
        seconds_besides=lengths.seconds_besides,
    )
    return Measures(judge, lengths, check), company


def _judge(
    task: Task,
    measures: Measures,
    name: str,
    kind: str,
    utterances: Sequence[Utterance],
    folder: Path,
    say: Callable[[str], None],
) -> Column:
    """All figures of some utterances."""
    words = None
    if task.recognizer is not None:
        say(f"{task.recognizer.name} hears {name}")
        transcripts = [task.recognizer.transcribe(each.waveform, each.sample_rate) for each in utterances]
        words = word_errors([each.text for each in utterances], transcripts, task.seed)
    # A measure that hears the channel has nothing to say of sounds that came through another one.
    comparable = kind != "recordings" or measures.check.learnt_from == "recordings"
    lengths, limit = measures.lengths, measures.check.repetition_limit
    spoken = [
        Spoken(
            text=each.text,
            seconds=each.seconds,
            ended=each.ended,
            expected_seconds=lengths.seconds(each.text) if lengths else None,
            repetition=longest_repetition(each.codes, each.log_mel),
            wav=None if kind == "recordings" else _write(each, folder, name, number),
        )
        for number, each in enumerate(utterances, start=1)
    ]

    def share(judged: Callable[[Spoken], bool]) -> float:
        return sum(judged(each) for each in spoken) / len(spoken)

    return Column(
        name=name,
        kind=kind,
        spoken=tuple(spoken),
        words=words,
        speaker=measures.judge.judge(utterances) if measures.judge is not None and comparable else None,
        ended=share(lambda each: each.ended) if kind == "voice" else None,
        as_long_as_expected=share(lambda each: lengths.fits(each.text, each.seconds)) if lengths else None,
        repeated=share(lambda each: each.repetition >= limit),
    )


def _write(utterance: Utterance, folder: Path, name: str, number: int) -> str:
    """Write a sound; its path in the folder."""
    path = Path(name) / f"{number:03}.wav"
    try:
        (folder / path).parent.mkdir(exist_ok=True)
        soundfile.write(folder / path, utterance.waveform.numpy(), utterance.sample_rate, "PCM_16")
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"{folder / path} can't be written ({error}); give another place with --out.") from error
    return path.as_posix()


def _channel(voice: Voice) -> str:
    """Names what turns codes into sound: voices with the same one can be compared with the same recordings."""
    digest = hashlib.sha256(voice.chain.mel_norms.numpy().tobytes())
    with voice.chain.shelf.use("dvae") as dvae:
        for tensor in dvae.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
