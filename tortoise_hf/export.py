"""Turn trained weights into one folder that TorToiSe's programs, transformers and this package load, and prove it.

The folder holds `config.json` + `model.safetensors` (for `from_pretrained`), `<step>_gpt.pth` in the published layout,
the tokenizer, the mel norms, the DVAE if it isn't the released one, `training_summary.json` and `export.json` (what was
written and what the self-test found). Where an adapter was trained, these are the merged weights; `adapter/` holds
the adapter alone. The folder is written under a temporary name and renamed when its self-test has passed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tortoise_hf.adapter_files import copy_adapter
from tortoise_hf.errors import UserError
from tortoise_hf.models.checkpoint_formats import (
    check_weights,
    fits_tortoise,
    published_layout,
    published_state_dict,
    read_gpt_weights,
    read_tensors,
    write_published,
)
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.models.pretrained import BaseFiles, build_gpt, load_dvae, load_mel_norms
from tortoise_hf.models.released import file_sha256

MARKER = "export.json"
SUMMARY = "training_summary.json"
FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Re-read weights run through the same code on the same machine; fp32 files must agree but for the order of additions.
_LOGIT_TOLERANCE = 1e-4
# Halves are rounded: allowed share of the largest logit. Measured on random full-size weights: below 0.2 %.
_ROUNDED_LOGIT_TOLERANCE = 0.02


@dataclass(frozen=True)
class SelfTest:
    """What the re-read files showed. `findings` tells each check in words, `failures` the ones that went wrong."""

    findings: dict[str, str]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every check went well."""
        return not self.failures


@dataclass(frozen=True)
class ExportReport:
    """A finished export."""

    path: Path
    step: int
    weights_file: str
    """Name of the file in the published layout."""
    for_tortoise: bool
    """Whether TorToiSe's programs can load that file, see `fits_tortoise`."""
    files: dict[str, dict[str, Any]]
    """File name -> size in bytes and sha256."""
    self_test: SelfTest

    def summary(self) -> str:
        """A few lines for the user."""
        what = f"{self.weights_file} for TorToiSe's programs" if self.for_tortoise else "for this program alone"
        lines = [f"Exported step {self.step} to {self.path} ({what}). Self-test:"]
        lines += [f"  {name}: {finding}" for name, finding in self.self_test.findings.items()]
        return "\n".join(lines)


def export_model(
    model: TortoiseGPT,
    out_dir: str | Path,
    *,
    files: BaseFiles,
    step: int,
    summary: Mapping[str, Any],
    dtype: str = "float32",
    attention_buffers: bool = True,
    base_state: Mapping[str, torch.Tensor] | None = None,
    adapter: Path | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the export folder of a trained model and test it.

    Args:
        model: the trained, unwrapped model, on any device. A float32 model on the CPU isn't copied.
        out_dir: folder to make. It must not exist, be empty, or (with `overwrite`) be an earlier export.
        files: base the run started from; tokenizer, mel norms and a DVAE of one's own are taken from it.
        step: optimizer steps behind the weights; names the file.
        summary: what `training_summary.json` shall hold; JSON values.
        dtype: of the `.pth` file's weights: float32, float16 or bfloat16. `model.safetensors` is always float32.
        attention_buffers: whether the `.pth` file holds the 2 old buffers per layer; strict loaders need them with
            transformers up to 4.29 and refuse them from 4.30 on.
        base_state: weights the run started from (`load_base_weights`); None skips that check.
        adapter: folder with the adapter that is merged into `model`; None where there is none.
        overwrite: replace an earlier export.

    Returns: the report, which is also stored in `export.json`.

    Raises:
        UserError: if out_dir holds something else, the weights aren't finite, or the self-test fails. Nothing is left
            behind then.
    """
    out_dir = Path(out_dir)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    _check_target(out_dir, overwrite)
    staging = out_dir.parent / f".{out_dir.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)  # of an earlier export that was killed
    staging.mkdir(parents=True)
    was_training = model.training
    try:
        trained = _on_cpu(model)
        weights_file = f"{step}_gpt.pth"
        layout = {"dtype": dtype, "attention_buffers": attention_buffers}
        _write_weights(trained, staging, weights_file, **layout)
        write_companions(staging, files)
        if adapter is not None:
            copy_adapter(adapter, staging)
        _write_json(staging / SUMMARY, {"step": step, **summary})
        self_test = run_self_test(trained, staging, weights_file, **layout, base_state=base_state)
        if not self_test.passed:
            raise UserError(
                f"The export of step {step} failed its self-test and was not kept: {'; '.join(self_test.failures)}."
            )
        report = ExportReport(
            out_dir, step, weights_file, fits_tortoise(trained.config), _list_files(staging), self_test
        )
        _write_json(staging / MARKER, _marker(report, layout))
        _put_in_place(staging, out_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        model.train(was_training)
    return report


def run_self_test(
    trained: TortoiseGPT,
    folder: Path,
    weights_file: str,
    *,
    dtype: str = "float32",
    attention_buffers: bool = True,
    base_state: Mapping[str, torch.Tensor] | None = None,
) -> SelfTest:
    """Read an export back and compare it with the trained model.

    Args:
        trained: the model the files were written from, float32 on the CPU.
        folder: the export.
        weights_file: name of the `.pth` file in it.
        dtype: of that file.
        attention_buffers: whether that file has them.
        base_state: weights the run started from, under the published names; None skips that check.
    """
    findings: dict[str, str] = {}
    failures: list[str] = []

    def note(name: str, finding: str, good: bool) -> None:
        findings[name] = finding
        if not good:
            failures.append(f"{name}: {finding}")

    state = trained.state_dict()
    layout = published_layout(trained.config, attention_buffers, DTYPES[dtype])
    raw = read_tensors(folder / weights_file)
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in raw.items()}
    wrong = [key for key in layout.keys() | found.keys() if layout.get(key) != found.get(key)]
    names = "all as published" if fits_tortoise(trained.config) else "named as published, in sizes of its own"
    note("key table", _count(len(found), f"keys, {names}", sorted(wrong)), not wrong)
    if not wrong:
        unequal = [key for key in state if not torch.equal(raw[key], state[key].to(DTYPES[dtype]))]
        note(f"{weights_file} weights", _count(len(state), "tensors equal the trained ones", unequal), not unequal)
    stored = load_file(folder / "model.safetensors")
    unequal = [key for key in state.keys() | stored.keys() if not _same(state.get(key), stored.get(key))]
    note("model.safetensors weights", _count(len(stored), "tensors equal the trained ones", unequal), not unequal)
    del stored

    if not failures:
        expected = _logits(trained)
        reread = build_gpt(trained.config, read_gpt_weights(folder / weights_file))
        allowed = _LOGIT_TOLERANCE if dtype == "float32" else _ROUNDED_LOGIT_TOLERANCE * float(expected.abs().max())
        difference = float((_logits(reread) - expected).abs().max())
        note(
            f"{weights_file} logits",
            f"differ by at most {difference:.1e} (allowed {allowed:.1e})",
            difference <= allowed,
        )
        del reread
        loaded = TortoiseGPT.from_pretrained(folder, dtype=torch.float32).eval()
        difference = float((_logits(loaded) - expected).abs().max())
        note(
            "model.safetensors logits",
            f"differ by at most {difference:.1e} (allowed {_LOGIT_TOLERANCE:.1e})",
            difference <= _LOGIT_TOLERANCE,
        )
        del loaded

    if base_state is None:
        findings["difference from the base"] = "not compared"
    else:
        note("difference from the base", *_compare_with_base(state, base_state))
    return SelfTest(findings, tuple(failures))


def _compare_with_base(state: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> tuple[str, bool]:
    changed, largest = 0, 0.0
    for key, tensor in state.items():
        before = base.get(key)
        if before is None or before.shape != tensor.shape:
            changed += 1
            continue
        change = float((tensor.float() - before.float()).abs().max())
        changed += change > 0
        largest = max(largest, change)
    if not changed:
        return "none: the weights are the base's own, nothing was trained", False
    return f"{changed} of {len(state)} tensors changed, by {largest:.1e} at most", True


def _same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    return first is not None and second is not None and torch.equal(first, second)


def _count(total: int, good: str, wrong: list[str]) -> str:
    return f"{total} {good}" if not wrong else f"{len(wrong)} of {total} differ, first {wrong[0]}"


@torch.no_grad()
def _logits(model: TortoiseGPT) -> torch.Tensor:
    """All logits for a fixed input of 20 text ids, 30 mel codes and two conditioning clips of 6 s, flattened."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    text_ids = torch.randint(1, config.num_text_tokens, (1, min(20, config.max_text_tokens)), generator=generator)
    mel_codes = torch.randint(0, config.num_mel_codes, (1, min(30, config.max_mel_tokens)), generator=generator)
    conditioning_mel = torch.randn(1, 2, config.num_mel_bins, 517, generator=generator)
    pad = torch.nn.functional.pad
    text_inputs = pad(pad(text_ids, (1, 0), value=config.start_text_id), (0, 1), value=config.stop_text_id)
    mel_inputs = pad(pad(mel_codes, (1, 0), value=config.start_mel_id), (0, 1), value=config.stop_mel_id)
    output = model.eval()(text_inputs, mel_inputs, conditioning_mel=conditioning_mel)
    return torch.cat([output.text_logits.flatten(), output.mel_logits.flatten()])


def _on_cpu(model: TortoiseGPT) -> TortoiseGPT:
    """The model itself if it is float32 on the CPU and holds no compiled parts, else a copy like that."""
    state = {key.replace("_orig_mod.", ""): tensor for key, tensor in model.state_dict().items()}
    plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in state.values())
    if plain and state.keys() == model.state_dict().keys():
        return model.eval()
    return build_gpt(model.config, state)


def _check_target(out_dir: Path, overwrite: bool) -> None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if not is_export(out_dir):
        raise UserError(
            f"{out_dir} exists and is not an export of this program, so it was left alone; give another folder."
        )
    if not overwrite:
        raise UserError(f"{out_dir} already holds an export; pass --overwrite to replace it, or give another folder.")


def is_export(folder: str | Path) -> bool:
    """Whether a folder was written by `export_model`."""
    try:
        return json.loads((Path(folder) / MARKER).read_text(encoding="utf-8")).get("made_by") == "tortoise_hf"
    except (OSError, ValueError, AttributeError):
        return False


def _write_weights(trained: TortoiseGPT, folder: Path, weights_file: str, dtype: str, attention_buffers: bool) -> None:
    state = trained.state_dict()
    layout = published_layout(trained.config, attention_buffers=False)
    check_weights(state, layout, "The trained model")
    published = published_state_dict(state, trained.config, DTYPES[dtype], attention_buffers)
    if dtype != "float32":  # a value may have become infinite
        check_weights({key: published[key] for key in state}, layout, f"The trained model in {dtype}")
    write_published(published, folder / weights_file)
    trained.save_pretrained(folder)


def _list_files(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _marker(report: ExportReport, layout: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "made_by": "tortoise_hf",
        "format": FORMAT,
        "step": report.step,
        "weights_file": report.weights_file,
        **layout,
        "files": report.files,
        "self_test": asdict(report.self_test) | {"passed": report.self_test.passed},
    }


def write_companions(folder: Path, files: BaseFiles) -> None:
    """Write what lies beside the weights: tokenizer, mel norms, and the DVAE if there is one but the released."""
    shutil.copyfile(files.tokenizer, folder / "tokenizer.json")
    save_file({"mel_norms": load_mel_norms(files).float().contiguous()}, folder / "mel_norms.safetensors")
    if files.dvae_weights is not None and not files.dvae_is_released:
        load_dvae(files).save_pretrained(folder / "dvae")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _put_in_place(staging: Path, out_dir: Path) -> None:
    for path in staging.rglob("*.safetensors"):
        shutil.copymode(staging / MARKER, path)  # safetensors writes for the owner alone, whatever the umask
    for path in [*staging.rglob("*"), staging]:
        _sync(path)
    replaced = out_dir.parent / f".{out_dir.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(replaced)
    staging.rename(out_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync(out_dir.parent)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # folders can't be flushed elsewhere
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
