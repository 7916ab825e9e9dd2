"""What a voice's repository holds: an export and what makes it a voice, free of anything about this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
from safetensors.torch import load_file

from tortoise_hf.audio import SAMPLE_RATE, AudioError, load_waveform
from tortoise_hf.config import Config, HubConfig
from tortoise_hf.data.ljspeech import read_rows
from tortoise_hf.errors import UserError
from tortoise_hf.export import FORMAT, MARKER, SUMMARY
from tortoise_hf.hub.card import CardFacts, Sample, make_card
from tortoise_hf.hub.curve import draw_curve
from tortoise_hf.hub.pull import is_hub_name
from tortoise_hf.models.checkpoint_formats import published_state_dict, write_published
from tortoise_hf.models.gpt import GPTConfig
from tortoise_hf.models.released import file_sha256
from tortoise_hf.units import format_seconds

PATH_SETTINGS = (
    "data.root", "data.train_list", "data.eval_list", "data.cache_dir", "model.base", "model.weights_dir",
    "model.tokenizer", "training.output_dir", "training.resume",
)  # fmt: skip
"""Settings that name places on this machine."""
CONDITIONING_DIR = "conditioning"
SAMPLES_DIR = "samples"
SAMPLES_LIST = "samples.json"
"""In a run's `samples` folder: a list of {"text", "tuned", "base"}, the latter two names of recordings beside it. Where
it is there, the recordings are published and the card plays them."""
NUM_CONDITIONING = 4
_BEST_SECONDS = 8.0  # TorToiSe takes about 6 to 10 s of each reference clip
_BATCH_CLIPS = 1000


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the last part only of whatever names a place on this machine; what concerns the Hub is left out."""
    public = {section: dict(values) for section, values in settings.items() if section != "hub"}
    for key in PATH_SETTINGS:
        section, name = key.split(".")
        value = public.get(section, {}).get(name)
        if isinstance(value, str) and ("/" in value or "\\" in value) and not is_hub_name(value):
            public[section][name] = Path(value.replace("\\", "/")).name
    return public


def local_paths(settings: Mapping[str, Any], run_dir: Path) -> list[str]:
    """Absolute folders that nothing uploaded may name."""
    places = [settings.get(key.split(".")[0], {}).get(key.split(".")[1]) for key in PATH_SETTINGS]
    found = [str(Path(place).expanduser()) for place in places if isinstance(place, str)]
    return [path for path in [*found, str(run_dir.absolute()), os.getcwd()] if os.path.isabs(path)]


def link_file(source: Path, target: Path) -> None:
    """The same file under another name, copied where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def write_checkpoint_export(
    checkpoint: Path, out_dir: Path, companions: Path, step: int, summary: Mapping[str, Any]
) -> None:
    """Write the files of an export out of a checkpoint's, while the run goes on.

    Builds no model and draws no random number, so a thread beside the training may call it. The weights are compared
    with the checkpoint's after they were written; the logits of a full self-test are not.

    Args:
        checkpoint: holds model.safetensors and config.json.
        out_dir: folder to make.
        companions: folder with tokenizer, norms and a DVAE of one's own.
        step: of the checkpoint.
        summary: see `export_model`.

    Raises:
        UserError: if what was written doesn't read back equal.
    """
    shutil.rmtree(out_dir, ignore_errors=True)
    for path in (file for file in companions.rglob("*") if file.is_file()):
        link_file(path, out_dir / path.relative_to(companions))
    for name in ("model.safetensors", "config.json"):
        link_file(checkpoint / name, out_dir / name)
    config = GPTConfig.from_dict(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    weights = load_file(checkpoint / "model.safetensors")
    weights_file = f"{step}_gpt.pth"
    write_published(published_state_dict(weights, config), out_dir / weights_file)
    written = torch.load(out_dir / weights_file, map_location="cpu", weights_only=True)
    if not all(torch.equal(written[key], tensor.float()) for key, tensor in weights.items()):
        raise UserError(f"{weights_file} did not read back equal to the checkpoint of step {step}; nothing was pushed.")
    _write_json(out_dir / SUMMARY, {"step": step, **summary})
    files = {
        path.relative_to(out_dir).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(out_dir.rglob("*"))
        if path.is_file()
    }
    finding = f"{len(weights)} tensors equal the checkpoint's"
    marker = {"made_by": "tortoise_hf", "format": FORMAT, "step": step, "weights_file": weights_file, "files": files}
    marker |= {"self_test": {"findings": {f"{weights_file} weights": finding}, "failures": [], "passed": True}}
    _write_json(out_dir / MARKER, marker)


def assemble_voice(export_dir: Path, out_dir: Path, run_dir: Path, hub: HubConfig) -> Path:
    """Make the folder that is pushed: an export, its card, curve, reference clips and samples.

    Args:
        export_dir: what `export_model` or `write_checkpoint_export` wrote.
        out_dir: folder to make; an earlier one is replaced.
        run_dir: the run's folder; its log, dataset report, reference clips and samples are used if they are there.
        hub: repository, consent and licence for the card.

    Returns: out_dir.
    """
    shutil.rmtree(out_dir, ignore_errors=True)
    for path in (file for file in export_dir.rglob("*") if file.is_file()):
        link_file(path, out_dir / path.relative_to(export_dir))
    summary = _read_json(export_dir / SUMMARY)
    marker = _read_json(export_dir / MARKER)
    settings = summary["settings"]
    log_history = _read_log(run_dir / "log.jsonl")
    summary["settings"] = public_settings(settings)
    summary["lineage"] = _lineage(summary, settings)
    _replace_json(out_dir / SUMMARY, summary)
    marker["files"][SUMMARY] = {
        "bytes": (out_dir / SUMMARY).stat().st_size,
        "sha256": file_sha256(out_dir / SUMMARY),
    }
    _replace_json(out_dir / MARKER, marker)
    for path in sorted((run_dir / CONDITIONING_DIR).glob("*.wav")):
        link_file(path, out_dir / CONDITIONING_DIR / path.name)
    samples = _take_samples(run_dir / SAMPLES_DIR, out_dir / SAMPLES_DIR)
    report = _read_json(run_dir / "dataset_report.json") if (run_dir / "dataset_report.json").is_file() else {}
    root = settings["data"]["root"]
    duration = training_seconds(log_history, settings["training"].get("batch_size"), marker["step"])
    facts = CardFacts(
        repo_id=hub.repo_id,
        step=marker["step"],
        weights_file=marker["weights_file"],
        consent=hub.consent.strip(),
        license=hub.license,
        language=hub.language,
        settings=summary["settings"],
        lineage=summary["lineage"],
        evaluations=summary["evaluations"],
        dataset=root.split("@")[0] if is_hub_name(root) else None,
        num_clips=summary.get("num_train_clips"),
        minutes=report.get("minutes"),
        duration=None if duration is None else format_seconds(duration),
        hardware=summary.get("hardware"),
        has_curve=draw_curve(log_history, out_dir / "training_curve.png"),
        num_conditioning=len(list((out_dir / CONDITIONING_DIR).glob("*.wav"))),
        samples=samples,
    )
    (out_dir / "README.md").write_text(str(make_card(facts)), encoding="utf-8")
    return out_dir


def _lineage(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    if settings["model"]["from_scratch"]:
        return ["random weights"]
    return list(summary.get("lineage") or ["weights whose origin is not known"])


def _take_samples(source: Path, target: Path) -> list[Sample]:
    if not (source / SAMPLES_LIST).is_file():
        return []
    samples = []
    for entry in json.loads((source / SAMPLES_LIST).read_text(encoding="utf-8")):
        names = {role: entry[role] for role in ("tuned", "base") if entry.get(role)}
        for name in names.values():
            link_file(source / name, target / Path(name).name)
        paths = {role: f"{SAMPLES_DIR}/{Path(name).name}" for role, name in names.items()}
        samples.append(Sample(text=entry["text"].replace("|", "/"), **paths))
    return samples


def training_seconds(log_history: Sequence[Mapping[str, Any]], batch_size: int | None, step: int) -> float | None:
    """Time spent in steps up to `step`, by the speeds in the log; resumed runs count once. None if nothing is known."""
    if not batch_size:
        return None
    seconds, before = 0.0, 0
    for entry in log_history:
        if "clips_per_second" in entry and before < entry["step"] <= step:
            seconds += (entry["step"] - before) * batch_size / max(entry["clips_per_second"], 1e-9)
            before = entry["step"]
    return seconds or None


def write_conditioning(cfg: Config, clip_ids: Sequence[str], run_dir: Path) -> int:
    """Keep a few reference clips of the speaker with the run, as WAV files of 22.05 kHz.

    Clips of about eight seconds are chosen from the training clips, spread over them.

    Args:
        cfg: of the run; its dataset is read again.
        clip_ids: of the training clips.
        run_dir: the run's folder.

    Returns: how many there are.
    """
    folder = run_dir / CONDITIONING_DIR
    if folder.is_dir():
        return len(list(folder.glob("*.wav")))
    wanted = set(clip_ids)
    rows = read_rows(cfg.data).train
    paths = [path for clip, path in zip(rows["clip_id"], rows["audio_path"], strict=True) if clip in wanted and path]
    paths = paths[:: max(1, len(paths) // _BATCH_CLIPS)]
    lengths = []
    for path in paths:
        try:
            lengths.append((abs(soundfile.info(path).duration - _BEST_SECONDS), path))
        except RuntimeError:  # not a file libsndfile knows
            continue
    staging = run_dir / f".{CONDITIONING_DIR}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for number, (_, path) in enumerate(sorted(lengths)[:NUM_CONDITIONING], start=1):
        try:
            waveform = load_waveform(Path(path))
        except AudioError:
            continue
        soundfile.write(staging / f"clip-{number}.wav", waveform.numpy(), SAMPLE_RATE, "PCM_16")
    staging.rename(folder)
    return len(list(folder.glob("*.wav")))


def hub_settings(settings: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> HubConfig:
    """The hub section of a run's record, with other values where some are given.

    Raises: UserError: if a value is wrong.
    """
    try:
        values = HubConfig(**settings.get("hub", {}))
        return dataclasses.replace(
            values, **{key: value for key, value in (changes or {}).items() if value is not None}
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace_json(path: Path, value: Any) -> None:
    """A new file in the place of a link: what it was linked to must not change."""
    path.unlink(missing_ok=True)
    _write_json(path, value)
