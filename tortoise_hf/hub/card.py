"""The model card of a voice: what the Hub indexes, and what a person reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("voice_card.md")
LIBRARY = "tortoise_hf"
TAGS = ("tortoise_hf", "tortoise-tts", "text-to-speech", "voice")
_EVALUATIONS_SHOWN = 12
_METRICS = (("eval_loss", "eval loss"), ("eval_mel_loss", "eval mel loss"), ("eval_text_loss", "eval text loss"))


@dataclass(frozen=True)
class Sample:
    """A sentence spoken by the voice and, for comparison, by the model it started from; paths in the repository."""

    text: str
    tuned: str
    base: str | None = None
    preview: bool = False
    """Whether they were made without the chain's large models."""


@dataclass(frozen=True)
class AdapterFacts:
    """What a card says of an adapter that was pushed without the weights it belongs to."""

    rank: int
    num_bytes: int
    base: str
    """Repository of these weights."""
    revision: str | None
    """Commit there; None for the released weights."""
    base_sha256: str
    """Their fingerprint, see `lora.fingerprint`."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says."""

    repo_id: str
    step: int
    weights_file: str
    """In TorToiSe's layout; of an adapter, what pulling it into a folder makes of it."""
    consent: str
    license: str
    language: str
    settings: Mapping[str, Any]
    """All settings, without local paths."""
    lineage: Sequence[str]
    """What it started from, nearest first; voices on the Hub as owner/name@commit."""
    evaluations: Sequence[Mapping[str, Any]]
    dataset: str | None = None
    """Id of the dataset on the Hub."""
    num_clips: int | None = None
    minutes: float | None = None
    duration: str | None = None
    hardware: str | None = None
    has_curve: bool = False
    num_conditioning: int = 0
    latents: Sequence[str] = ()
    """Of which models `latents.safetensors` holds what they hear in the clips: gpt, diffusion."""
    for_tortoise: bool = True
    """Whether the GPT has the released sizes, which TorToiSe's programs and the models behind the GPT take."""
    samples: Sequence[Sample] = field(default_factory=tuple)
    adapter: AdapterFacts | None = None
    """None where the weights are whole."""


def make_card(facts: CardFacts) -> ModelCard:
    """The card, with metadata the Hub understands."""
    name = facts.repo_id.split("/")[-1]
    bases = [origin.split("@")[0] for origin in facts.lineage if "/" in origin and " " not in origin]
    relation = "finetune"
    if facts.adapter is not None:
        bases, relation = [facts.adapter.base], "adapter"
    widget = [{"text": sample.text, "output": {"url": sample.tuned}} for sample in facts.samples]
    data = ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name=LIBRARY,
        pipeline_tag="text-to-speech",
        base_model=bases[0] if bases else None,
        datasets=[facts.dataset] if facts.dataset else None,
        tags=[*TAGS, *(("lora", "peft") if facts.adapter else ())],
        model_name=name,
        eval_results=_eval_results(facts) or None,
        **({"base_model_relation": relation} if bases else {}),
        **({"widget": widget} if widget else {}),
    )
    values = {key: getattr(facts, key) for key in CardFacts.__dataclass_fields__}
    values["evaluations"] = shown(facts.evaluations, facts.step)
    return ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), name=name, **values)


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """Of the evaluation nearest before or at the step that is published."""
    entries = [entry for entry in facts.evaluations if entry["step"] <= facts.step]
    if not entries:
        return []
    return [
        EvalResult(
            task_type="text-to-speech",
            dataset_type=facts.dataset or "clips-kept-back",
            dataset_name=facts.dataset or "clips kept back from training",
            metric_type=key,
            metric_name=name,
            metric_value=round(entries[-1][key], 6),
        )
        for key, name in _METRICS
        if key in entries[-1]
    ]


def shown(evaluations: Sequence[Mapping[str, Any]], step: int) -> list[Mapping[str, Any]]:
    """Evenly spread rows of a table: the first, the last, and the published step's among them."""
    if len(evaluations) <= _EVALUATIONS_SHOWN:
        return list(evaluations)
    last = len(evaluations) - 1
    wanted = {round(index * last / (_EVALUATIONS_SHOWN - 1)) for index in range(_EVALUATIONS_SHOWN)}
    return [entry for index, entry in enumerate(evaluations) if index in wanted or entry["step"] == step]
