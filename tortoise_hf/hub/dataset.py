"""Share recordings: the clips of a checked dataset as Parquet files with a card, in one commit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Audio, Dataset, Features, Value
from huggingface_hub import DatasetCard, DatasetCardData

from tortoise_hf.audio import SAMPLE_RATE
from tortoise_hf.config import Config
from tortoise_hf.data.ljspeech import read_rows
from tortoise_hf.data.prepare import Prepared
from tortoise_hf.errors import UserError
from tortoise_hf.hub.client import ATTEMPTS, require_consent
from tortoise_hf.hub.push import Pushed, push_folder
from tortoise_hf.places import local_paths

TEMPLATE = Path(__file__).with_name("dataset_card.md")
MARKER = "tortoise_hf.json"
SHARD_BYTES = 400_000_000
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**12, "n>100K"))


def push_dataset(
    cfg: Config,
    data: Prepared,
    repo_id: str,
    *,
    attempts: int = ATTEMPTS,
    wait: Callable[[float], object] | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Push the clips that were kept, as files, with their transcripts, split as the run splits them.

    Args:
        cfg: the experiment; says where the recordings are, and consent, licence and language for the card.
        data: what `prepare_dataset` made of them.
        repo_id: owner/name of the dataset.
        attempts: see `retry`, as for `wait`.
        wait: see there.
        endpoint: the Hub's address; default as HF_ENDPOINT says.

    Raises:
        UserError: if consent is missing, a recording is gone, or the Hub refuses or can't be reached.
    """
    require_consent(cfg.hub)
    folder = Path(cfg.data.cache_dir).expanduser() / "push" / repo_id.replace("/", "--")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _write(cfg, data, repo_id, folder)
        return push_folder(
            folder,
            repo_id,
            message=f"{len(data.train) + len(data.eval):,} clips",
            marker=MARKER,
            private=cfg.hub.private,
            revision=cfg.hub.revision,
            repo_type="dataset",
            replaces=("data/*",),
            local_paths=local_paths(cfg.to_dict(), Path(cfg.training.output_dir)),
            attempts=attempts,
            wait=wait,
            endpoint=endpoint,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(cfg: Config, data: Prepared, repo_id: str, folder: Path) -> None:
    raw = read_rows(cfg.data)
    paths: dict[tuple[str, str], str] = {}
    for rows in (raw.train, raw.eval):
        if rows is None:
            continue
        for clip, text, path in zip(rows["clip_id"], rows["text"], rows["audio_path"], strict=True):
            if path:
                paths.setdefault((clip, text), path)
    has_speakers = len({*data.train["speaker"], *data.eval["speaker"]}) > 1
    splits = {"train": data.train, "validation": data.eval}
    configs = []
    for split, examples in splits.items():
        if len(examples) == 0:
            continue
        columns = examples.select_columns(["clip_id", "text", "speaker"]).to_list()
        _write_split(columns, paths, has_speakers, folder / "data", split)
        configs.append({"split": split, "path": f"data/{split}-*"})
    total = len(data.train) + len(data.eval)
    seconds = sum(sum(examples["num_samples"]) for examples in splits.values()) / SAMPLE_RATE
    (folder / MARKER).write_text(json.dumps({"made_by": "tortoise_hf", "clips": total}) + "\n", encoding="utf-8")
    card_data = DatasetCardData(
        language=cfg.hub.language,
        license=cfg.hub.license,
        task_categories=["text-to-speech"],
        size_categories=next(name for most, name in _SIZES if total < most),
        pretty_name=repo_id.split("/")[-1],
        tags=["tortoise_hf", "audio"],
        configs=[{"config_name": "default", "data_files": configs}],
    )
    card = DatasetCard.from_template(
        card_data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        num_train=len(data.train),
        num_eval=len(data.eval),
        minutes=seconds / 60,
        consent=cfg.hub.consent.strip(),
        has_speakers=has_speakers,
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def _write_split(
    columns: Sequence[dict[str, str]],
    paths: dict[tuple[str, str], str],
    has_speakers: bool,
    folder: Path,
    split: str,
) -> None:
    """Parquet files of one split, each about `SHARD_BYTES` large; recordings are read one file at a time."""
    shards: list[list[dict[str, str]]] = [[]]
    size = 0
    for row in columns:
        path = paths.get((row["clip_id"], row["text"]))
        if path is None or not Path(path).is_file():
            raise UserError(f"The recording of {row['clip_id']} is gone ({path}); run again to check the dataset anew.")
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        size += Path(path).stat().st_size
        shards[-1].append({**row, "path": path})
    features = Features({"id": Value("string"), "audio": {"bytes": Value("binary"), "path": Value("string")}})
    features["text"] = Value("string")
    if has_speakers:
        features["speaker"] = Value("string")
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(shards):
        values = {
            "id": [row["clip_id"] for row in rows],
            "audio": [
                # The name only: the folder is nobody's business.
                {"bytes": Path(row["path"]).read_bytes(), "path": Path(row["clip_id"]).name + Path(row["path"]).suffix}
                for row in rows
            ],
            "text": [row["text"] for row in rows],
            "speaker": [row["speaker"] for row in rows],
        }
        dataset = Dataset.from_dict({name: values[name] for name in features}, features=features)
        dataset = dataset.cast_column("audio", Audio(decode=False))
        dataset.to_parquet(folder / f"{split}-{number:05}-of-{len(shards):05}.parquet")
