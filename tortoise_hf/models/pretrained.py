"""Where a run starts: find the base's files, fetch what it lacks from the release, and build the models from them.

A base is "released" (TorToiSe's own weights), a folder, or a weights file. Folder layout, the same as an export's:
`config.json` + `model.safetensors` (or a `.pth` in the published layout), `tokenizer.json`, `mel_norms.safetensors`,
`dvae/config.json` + `dvae/model.safetensors`. Whatever a base lacks comes from the released files. In place of weights
a folder may hold an adapter, which names a base of its own; that is fetched as well, and the adapter merged into it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import initialization

from tortoise_hf.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from tortoise_hf.adapter_files import is_adapter, read_adapter_config
from tortoise_hf.audio import load_mel_norms as read_mel_norms
from tortoise_hf.config import ModelConfig
from tortoise_hf.errors import UserError
from tortoise_hf.hub.pull import is_hub_name, pull_repository, pull_voice
from tortoise_hf.lora import merge_adapter, merged_fingerprint
from tortoise_hf.models.base_folder import RELEASED_BASE, RELEASED_REPO, look_into_base, read_config
from tortoise_hf.models.checkpoint_formats import (
    check_weights,
    config_from_weights,
    published_layout,
    read_gpt_weights,
    read_tensors,
)
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
from tortoise_hf.models.released import RELEASED, fetch_released, file_sha256
from tortoise_hf.models.vocabulary import map_vocabulary, resize_text_rows
from tortoise_hf.text import TextTokenizer

logger = logging.getLogger(__name__)

MOST_ADAPTERS = 8
"""On top of each other: a voice whose base is an adapter whose base is an adapter, and so on."""
# What a base may lack, and the released file that stands in for it.
_RELEASED_NAMES = {
    "gpt_weights": "autoregressive.pth",
    "tokenizer": "tokenizer.json",
    "mel_norms": "mel_norms.pth",
    "dvae_weights": "dvae.pth",
}


@dataclass(frozen=True)
class BaseFiles:
    """The files a run starts from, all of them on this machine."""

    gpt_weights: Path | None
    """Autoregressive weights in any layout, or an adapter's; None for random ones."""
    gpt_config: Path | None
    """config.json of the GPT; None where the sizes are read off the weights, or are the released ones."""
    gpt_tokenizer: Path
    """tokenizer.json the weights were made with."""
    tokenizer: Path
    """tokenizer.json the run uses; where it differs from `gpt_tokenizer`, text rows are mapped."""
    mel_norms: Path
    """Norms of the mel front end (.safetensors, .pth or .json)."""
    dvae_weights: Path | None
    """Weights of the DVAE (.safetensors or .pth); None where they weren't asked for."""
    dvae_config: Path | None
    """config.json of the DVAE; None for the released sizes."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Where each file came from, in words; for the log and the training summary."""
    lineage: tuple[str, ...] = ()
    """What the weights come from, nearest first: voices on the Hub (owner/name@commit), the release."""
    adapted: BaseFiles | None = None
    """Where `gpt_weights` are an adapter's: the files of what it is merged into."""

    def sha256(self, name: str) -> str:
        """Sha256 of one of the files above, for cache keys; reads the whole file."""
        return file_sha256(getattr(self, name))

    @property
    def dvae_is_released(self) -> bool:
        """Whether the DVAE is TorToiSe's own, so that an export needn't carry it."""
        return self.sha256("dvae_weights") == RELEASED["dvae.pth"].sha256


def resolve_base(
    cfg: ModelConfig, *, dvae: bool = True, cache_dir: str | Path | None = None, endpoint: str | None = None
) -> BaseFiles:
    """Find the files of a base, fetching from the release what it lacks.

    Args:
        cfg: `base`, `weights_dir`, `tokenizer` and `from_scratch` are read.
        dvae: False for speaking, which does without a DVAE: the released one isn't fetched for a base that has none.
        cache_dir: the Hub's cache, see `fetch_released`.
        endpoint: the Hub's address, see `fetch_released`.

    Raises: UserError: if the base doesn't exist or is ambiguous, a released file can't be had, or an adapter's own base
        can't be.
    """
    return _resolve(cfg, dvae, cache_dir, endpoint, 0)


def _resolve(
    cfg: ModelConfig, dvae: bool, cache_dir: str | Path | None, endpoint: str | None, num_adapters: int
) -> BaseFiles:
    own_tokenizer = None if cfg.tokenizer is None else Path(cfg.tokenizer).expanduser()
    weights_dir = None if cfg.weights_dir is None else Path(cfg.weights_dir).expanduser()
    if own_tokenizer is not None:
        TextTokenizer.from_file(own_tokenizer)  # a wrong file is named before gigabytes are fetched
    base, lineage = _find_base(cfg, cache_dir, endpoint)
    found = {} if base is None else look_into_base(base, cfg.from_scratch)
    adapted, inherited = None, {}
    if found.get("gpt_weights", Path()).name == ADAPTER_WEIGHTS or (cfg.from_scratch and base and is_adapter(base)):
        folder = base if base.is_dir() else base.parent
        under = _below(folder, cfg, found.get("tokenizer"), cache_dir, endpoint, num_adapters)
        adapted = _resolve(under, dvae, cache_dir, endpoint, num_adapters + 1)
        roles = ["tokenizer", "mel_norms", *([] if "dvae_weights" in found else ["dvae_weights", "dvae_config"])]
        inherited = {role: getattr(adapted, role) for role in roles if role not in found and getattr(adapted, role)}
        found |= inherited
    lacking = {role: name for role, name in _RELEASED_NAMES.items() if role not in found}
    if not dvae:
        lacking.pop("dvae_weights", None)
    if cfg.from_scratch:
        del lacking["gpt_weights"]
        if own_tokenizer is not None:
            lacking.pop("tokenizer", None)
    names = set(lacking.values())
    # Without weights of its own a base uses the released ones, which were made with the released tokenizer.
    if "gpt_weights" in lacking:
        names.add("tokenizer.json")
    fetched = fetch_released(sorted(names), weights_dir, cache_dir=cache_dir, endpoint=endpoint)

    paths = found | {role: fetched[name].path for role, name in lacking.items()}
    if own_tokenizer is not None:
        paths["tokenizer"] = own_tokenizer
        lacking.pop("tokenizer", None)
    made_with = paths["tokenizer"]
    if "gpt_weights" in lacking:
        made_with = fetched["tokenizer.json"].path
    elif own_tokenizer is not None and not cfg.from_scratch:
        made_with = found.get("tokenizer") or fetched["tokenizer.json"].path
    origins = {role: adapted.origins[role] if role in inherited else str(path) for role, path in paths.items()}
    for role, name in lacking.items():
        file = fetched[name]
        origins[role] = f"{file.origin} (sha256 {file.sha256}, compared with {file.compared_with})"
    return BaseFiles(
        gpt_weights=paths.get("gpt_weights"),
        gpt_config=paths.get("gpt_config"),
        gpt_tokenizer=made_with,
        tokenizer=paths["tokenizer"],
        mel_norms=paths["mel_norms"],
        dvae_weights=paths.get("dvae_weights"),
        dvae_config=paths.get("dvae_config"),
        origins=origins,
        lineage=lineage,
        adapted=adapted,
    )


def _below(
    folder: Path,
    cfg: ModelConfig,
    tokenizer: Path | None,
    cache_dir: str | Path | None,
    endpoint: str | None,
    num_adapters: int,
) -> ModelConfig:
    """What an adapter is merged into, as a base; fetched where it is a voice on the Hub.

    It is given the adapter's tokenizer, whose text rows the adapter was trained with.
    """
    named = read_adapter_config(folder)
    if named.base is None:
        raise UserError(
            f"{folder} holds an adapter without the weights that it belongs to, and doesn't say where they are; give "
            "the export of its run, which is whole, or a voice on the Hub."
        )
    if num_adapters == MOST_ADAPTERS:
        raise UserError(
            f"{folder} holds an adapter to an adapter, and so on, {MOST_ADAPTERS} times; give a whole voice instead."
        )
    base = RELEASED_BASE
    if named.base != RELEASED_REPO:
        try:
            base = str(pull_repository(named.base, named.revision, cache_dir=cache_dir, endpoint=endpoint))
        except UserError as error:
            raise UserError(
                f"{folder} holds an adapter to {named.base_name}, and without that it is of no use: {error}"
            ) from error
    return dataclasses.replace(cfg, base=base, tokenizer=None if tokenizer is None else str(tokenizer))


def _find_base(
    cfg: ModelConfig, cache_dir: str | Path | None, endpoint: str | None
) -> tuple[Path | None, tuple[str, ...]]:
    """(folder or file of the base, None for the release; what its weights come from)."""
    if cfg.base == RELEASED_BASE:
        return None, ("random weights",) if cfg.from_scratch else (RELEASED_REPO,)
    base, name = Path(cfg.base).expanduser(), ()
    if is_hub_name(cfg.base):
        base = pull_voice(cfg.base, cache_dir=cache_dir, endpoint=endpoint)
        name = (f"{cfg.base.split('@')[0]}@{base.name}",)  # the folder bears the commit's name
    if cfg.from_scratch:
        return base, ("random weights",)
    summary = base / "training_summary.json"
    try:
        parents = json.loads(summary.read_text(encoding="utf-8")).get("lineage", []) if summary.is_file() else []
    except (OSError, ValueError, AttributeError):
        parents = []
    return base, (*name, *(str(parent) for parent in parents))


def load_gpt(files: BaseFiles, from_scratch: bool = False, seed: int = 0, *, keep_mapped: bool = False) -> TortoiseGPT:
    """The GPT of a base in float32 on the CPU, in evaluation mode.

    Args:
        files: from `resolve_base`. Where its two tokenizers differ, text rows are mapped and the mapping is logged.
        from_scratch: random weights of the base's size, with text rows for `files.tokenizer`.
        seed: of the random weights; the global random state is left as it was.
        keep_mapped: leave float32 weights mapped from the file instead of copying them, which halves the memory; for
            speaking, because the file must stay as it is meanwhile.

    Raises: UserError: if the weights don't fill the model exactly (see `check_weights`) or can't be read, or the DVAE's
        codes aren't the model's.
    """
    if from_scratch or files.gpt_weights is None:
        config = read_config(files.gpt_config, GPTConfig) if files.gpt_config is not None else GPTConfig()
        vocab_size = TextTokenizer.from_file(files.tokenizer).vocab_size
        config.num_text_tokens = max(config.num_text_tokens, vocab_size)
        _check_codes(files, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return TortoiseGPT(config).eval()
    config, weights = load_base_weights(files)
    _check_codes(files, config)
    model = build_gpt(config, weights, keep_mapped or files.adapted is not None)
    if files.adapted is not None:
        own, used = file_sha256(files.gpt_tokenizer), file_sha256(files.tokenizer)
        model.merged_from = merged_fingerprint(files.gpt_weights.parent, *(() if own == used else (own, used)))
    return model


def load_trained(checkpoint: Path, files: BaseFiles) -> TortoiseGPT:
    """The whole model of a checkpoint in float32 on the CPU; an adapter is merged into the base that it was trained on.

    Raises:
        UserError: if weights don't fill the model exactly or can't be read, or an adapter belongs to others than the
            base's.
    """
    if not is_adapter(checkpoint):
        # Not by from_pretrained, which goes on with random weights where some are missing.
        config, path = GPTConfig.from_pretrained(checkpoint), checkpoint / "model.safetensors"
        weights = read_gpt_weights(path)
        check_weights(weights, published_layout(config, attention_buffers=False), path)
        return build_gpt(config, weights)
    return merge_adapter(load_gpt(files), checkpoint)


def load_base_weights(files: BaseFiles) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    """Size and weights the run starts from, checked, with text rows for the run's tokenizer.

    The tensors keep the file's dtype and may be mapped from it instead of read.

    Raises: UserError: as `load_gpt`; also where the base has no weights.
    """
    if files.gpt_weights is None:
        raise UserError("The run started from random weights (model.from_scratch), so there are no base weights.")
    weights = read_gpt_weights(files.gpt_weights) if files.adapted is None else _merge(files)
    if files.gpt_config is not None:
        config = read_config(files.gpt_config, GPTConfig)
    else:
        config = config_from_weights(weights, files.gpt_weights)
    check_weights(weights, published_layout(config, attention_buffers=False), files.gpt_weights)
    if file_sha256(files.gpt_tokenizer) == file_sha256(files.tokenizer):
        _check_rows(files.tokenizer, config)
        return config, weights
    mapping = map_vocabulary(files.gpt_tokenizer, files.tokenizer, config.num_text_tokens)
    if not mapping.is_identity:
        logger.warning("%s: %s", files.tokenizer, mapping.summary())
        weights = resize_text_rows(weights, mapping)
        config.num_text_tokens = mapping.num_text_tokens
    return config, weights


def _merge(files: BaseFiles) -> dict[str, torch.Tensor]:
    """Whole weights of a base that is an adapter."""
    folder = files.gpt_weights.parent
    merged = merge_adapter(load_gpt(files.adapted), folder, read_adapter_config(folder).base_name)
    if files.gpt_config is not None:
        said = read_config(files.gpt_config, GPTConfig)
        for name in (name for name, default in vars(GPTConfig).items() if type(default) is int):
            if getattr(said, name) != getattr(merged.config, name):
                raise UserError(
                    f"{files.gpt_config} names {name} {getattr(said, name)}, and the base has "
                    f"{getattr(merged.config, name)}; an adapter and its base have the same sizes."
                )
    return merged.state_dict()


def _check_rows(tokenizer: Path, config: GPTConfig) -> None:
    vocab_size = TextTokenizer.from_file(tokenizer).vocab_size
    if vocab_size > config.num_text_tokens:
        raise UserError(
            f"{tokenizer} has {vocab_size} text ids, but the weights hold rows for {config.num_text_tokens}; they were "
            f"made with another tokenizer. Put that one beside the weights and pass yours as --model.tokenizer."
        )


def _check_codes(files: BaseFiles, config: GPTConfig) -> None:
    if files.dvae_weights is None:
        return
    dvae = DVAEConfig() if files.dvae_config is None else read_config(files.dvae_config, DVAEConfig)
    if dvae.num_codes != config.num_mel_codes:
        raise UserError(
            f"{files.dvae_weights} has {dvae.num_codes:,} codes, but the model takes {config.num_mel_codes:,}; put the "
            f"DVAE it was trained with beside its weights, as dvae/model.safetensors and dvae/config.json."
        )


def build_gpt(config: GPTConfig, weights: Mapping[str, torch.Tensor], keep_mapped: bool = False) -> TortoiseGPT:
    """A GPT in evaluation mode that holds these weights, in float32 on the CPU; names must fit exactly.

    It holds copies of them, or with `keep_mapped` the tensors themselves where they are float32 already.
    """
    # Random initialisation would take longer than reading the file, and every value is overwritten.
    with initialization.no_init_weights():
        model = TortoiseGPT(config)
    if keep_mapped:
        weights = {key: tensor.float() for key, tensor in weights.items()}
    model.load_state_dict(weights, strict=True, assign=keep_mapped)
    return model.eval()


def load_dvae(files: BaseFiles) -> DVAE:
    """The frozen DVAE of a base, in float32 on the CPU, in evaluation mode.

    Raises: UserError: if the file doesn't fill the model exactly.
    """
    config = read_config(files.dvae_config, DVAEConfig) if files.dvae_config is not None else DVAEConfig()
    weights = read_tensors(files.dvae_weights)
    with initialization.no_init_weights():
        dvae = DVAE(config)
    layout = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in dvae.state_dict().items()}
    check_weights(weights, layout, files.dvae_weights)
    dvae.load_state_dict(weights, strict=True)
    return dvae.eval().requires_grad_(False)


def load_tokenizer(files: BaseFiles) -> TextTokenizer:
    """The tokenizer the run uses."""
    return TextTokenizer.from_file(files.tokenizer)


def load_mel_norms(files: BaseFiles) -> torch.Tensor:
    """Norms of the mel front end, (80,) float32."""
    return read_mel_norms(files.mel_norms)
