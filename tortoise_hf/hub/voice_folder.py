"""What a voice's repository holds: an export and what makes it a voice, free of anything about this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file

from tortoise_hf.adapter_files import ADAPTER_DIR, ADAPTER_FILES, is_adapter
from tortoise_hf.adapter_files import CONFIG as ADAPTER_CONFIG
from tortoise_hf.checkpoint import MANIFEST
from tortoise_hf.config import HubConfig
from tortoise_hf.errors import UserError
from tortoise_hf.export import FORMAT, MARKER, SUMMARY
from tortoise_hf.hub.adapter_only import find_shareable_base, place_of, point_to_base
from tortoise_hf.hub.card import CardFacts, Sample, make_card
from tortoise_hf.hub.conditioning import map_gpt, write_latents
from tortoise_hf.hub.contents import WEIGHTS
from tortoise_hf.hub.curve import draw_curve, read_log
from tortoise_hf.latents import CLIPS_FOLDER, LATENTS_NAME, load_latents
from tortoise_hf.models.checkpoint_formats import fits_tortoise, published_state_dict, read_tensors, write_published
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
from tortoise_hf.models.released import file_sha256
from tortoise_hf.places import public_settings
from tortoise_hf.sample_folder import SAMPLES_DIR, SAMPLES_LIST
from tortoise_hf.units import format_seconds


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

    The weights are compared with the checkpoint's after they were written; the logits of a full self-test are not. An
    adapter stays one: there are no whole weights then.

    Args:
        checkpoint: holds model.safetensors or an adapter, config.json and the manifest with their hashes.
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
    manifest = _read_json(checkpoint / MANIFEST)["files"]
    adapted = is_adapter(checkpoint)
    places = {name: f"{ADAPTER_DIR}/{name}" for name in ADAPTER_FILES} if adapted else {WEIGHTS: WEIGHTS}
    places["config.json"] = "config.json"
    for name, place in places.items():
        link_file(checkpoint / name, out_dir / place)
    recorded = {place: manifest[name] for name, place in places.items()}
    weights_file = f"{step}_gpt.pth"
    findings = {} if adapted else {f"{weights_file} weights": _write_weights(checkpoint, out_dir / weights_file, step)}
    _write_json(out_dir / SUMMARY, {"step": step, **summary})
    names = sorted(path.relative_to(out_dir).as_posix() for path in out_dir.rglob("*") if path.is_file())
    files = {name: recorded.get(name) or _describe(out_dir / name) for name in names}
    marker = {"made_by": "tortoise_hf", "format": FORMAT, "step": step, "weights_file": weights_file, "files": files}
    marker |= {"self_test": {"findings": findings, "failures": [], "passed": True}}
    _write_json(out_dir / MARKER, marker)


def _write_weights(checkpoint: Path, path: Path, step: int) -> str:
    """Write a checkpoint's weights in the published layout; what reading them back showed."""
    config = GPTConfig.from_dict(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    weights = load_file(checkpoint / WEIGHTS)
    write_published(published_state_dict(weights, config), path)
    written = read_tensors(path)
    if not all(torch.equal(written[key], tensor.float()) for key, tensor in weights.items()):
        raise UserError(f"{path.name} did not read back equal to the checkpoint of step {step}; nothing was pushed.")
    return f"{len(weights)} tensors equal the checkpoint's"


def assemble_voice(
    export_dir: Path,
    out_dir: Path,
    run_dir: Path,
    hub: HubConfig,
    weights_dir: str | None = None,
    gpt: TortoiseGPT | None = None,
) -> Path:
    """Make the folder that is pushed: an export, its card, curve, reference clips with their latents, and samples.

    Args:
        export_dir: what `export_model` or `write_checkpoint_export` wrote. With `hub.adapter_only` its whole weights
            are left out.
        out_dir: folder to make; an earlier one is replaced.
        run_dir: the run's folder; its log, dataset report, reference clips and samples are used if they are there.
        hub: repository, consent and licence for the card.
        weights_dir: see `write_latents`.
        gpt: the export's whole model; None where the export holds it.

    Returns: out_dir.

    Raises:
        UserError: if the adapter alone is asked for and there is none, or others couldn't find its base.
    """
    shutil.rmtree(out_dir, ignore_errors=True)
    summary = _read_json(export_dir / SUMMARY)
    marker = _read_json(export_dir / MARKER)
    base = find_shareable_base(summary["settings"], summary.get("lineage", ())) if hub.adapter_only else None
    for path in (file for file in export_dir.rglob("*") if file.is_file()):
        name = path.relative_to(export_dir).as_posix()
        place = name if base is None else place_of(name)
        if place is not None:
            link_file(path, out_dir / place)
    adapter = None if base is None else point_to_base(out_dir, *base)
    log_history = read_log(run_dir / "log.jsonl")
    settings = summary["settings"] = public_settings(summary["settings"])
    summary["lineage"] = _lineage(summary, settings)
    _replace_json(out_dir / SUMMARY, summary)
    if adapter is not None:
        marker["files"] = {place: record for name, record in marker["files"].items() if (place := place_of(name))}
        marker["files"][ADAPTER_CONFIG] = _describe(out_dir / ADAPTER_CONFIG)
    marker["files"][SUMMARY] = _describe(out_dir / SUMMARY)
    _replace_json(out_dir / MARKER, marker)
    for path in sorted((run_dir / CLIPS_FOLDER).glob("*.wav")):
        link_file(path, out_dir / CLIPS_FOLDER / path.name)
    write_latents(out_dir, lambda: map_gpt(export_dir) if gpt is None else gpt, weights_dir)
    latents = load_latents(out_dir / LATENTS_NAME) if (out_dir / LATENTS_NAME).is_file() else None
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
        dataset=root.split("@")[0] if "/" in root else None,
        num_clips=summary.get("num_train_clips"),
        minutes=report.get("minutes"),
        duration=None if duration is None else format_seconds(duration),
        hardware=summary.get("hardware"),
        has_curve=draw_curve(log_history, out_dir / "training_curve.png"),
        num_conditioning=len(list((out_dir / CLIPS_FOLDER).glob("*.wav"))),
        latents=() if latents is None else ("gpt",) if latents.diffusion is None else ("gpt", "diffusion"),
        for_tortoise=fits_tortoise(GPTConfig.from_pretrained(out_dir)),
        samples=samples,
        adapter=adapter,
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
        names = {role: PurePosixPath(entry[role]) for role in ("tuned", "base") if entry.get(role)}
        for name in names.values():
            if name.is_absolute() or ".." in name.parts:
                raise UserError(f"{source / SAMPLES_LIST} names {name}, which leads out of its folder.")
            link_file(source / name, target / name)
        paths = {role: f"{SAMPLES_DIR}/{name}" for role, name in names.items()}
        samples.append(Sample(text=entry["text"].replace("|", "/"), preview=entry.get("preview", False), **paths))
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


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace_json(path: Path, value: Any) -> None:
    """A new file in the place of a link: what it was linked to must not change."""
    path.unlink(missing_ok=True)
    _write_json(path, value)
