"""A few examples become one batch: inputs and targets of both rows, where they go, conditioning.

Two ways to treat rows of unequal length. `mask`: every row is its own text or codes and one STOP; ids are padded to be
stacked, but the model computes real positions alone (see packing.py). `stop`: what lies behind a row is filled with
STOP tokens that count like any other, as the reference trainer does it; a clip's loss then depends on its neighbours,
so this is for comparisons only.
"""

# B batch · N conditionings, at most B · K conditioning clips · T text positions · C mel positions · F mel frames

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from tortoise_hf.data.packing import IGNORE_INDEX, Packing, pack
from tortoise_hf.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from tortoise_hf.data.conditioning import ConditioningDraws
    from tortoise_hf.data.sampler import Draw
    from tortoise_hf.models.gpt import GPTConfig


@dataclass
class Example:
    """One row before padding."""

    text_ids: np.ndarray
    """(n,) without START and STOP."""
    mel_codes: np.ndarray
    """(m,), `num_samples // 1024 + 1` of them, without START and STOP."""
    conditioning_mel: np.ndarray
    """(K, 80, F) float32."""
    index: int
    """Row of the examples."""
    weight: int = 1
    """1, or 0 if the row only fills a micro-batch."""
    conditioning_of: int | None = None
    """Rows with the same number share their conditioning; None: this one shares it with nobody."""


class ExampleDataset(torch.utils.data.Dataset):
    """Prepared examples with their conditioning, fetched by `Draw`s."""

    def __init__(self, examples: Dataset, conditioning: ConditioningDraws) -> None:
        """Look at prepared examples; nothing is read yet."""
        self._examples = examples.select_columns(["text_ids", "mel_codes"]).with_format("arrow")
        self._conditioning = conditioning

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, draw: Draw) -> Example:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[Example]:
        """One micro-batch; `DataLoader` asks for it like this."""
        examples: list[Example] = []
        heard: dict[int, np.ndarray] = {}
        for draw in draws:
            first = self._conditioning.sharing(draw)[0] if draw.group else None
            conditioning_mel = heard.get(first)
            if conditioning_mel is None:
                conditioning_mel = self._conditioning(draw)
            if first is not None:
                heard[first] = conditioning_mel
            row = self._examples[draw.index]
            examples.append(
                Example(
                    text_ids=row["text_ids"][0].values.to_numpy(),
                    mel_codes=row["mel_codes"][0].values.to_numpy(),
                    conditioning_mel=conditioning_mel,
                    index=draw.index,
                    weight=draw.weight,
                    conditioning_of=first,
                )
            )
        return examples


@dataclass
class Batch:
    """One micro-batch. Inputs hold START and STOP already; targets are the inputs moved one to the left."""

    text_inputs: torch.Tensor
    """(B, T) int64."""
    text_targets: torch.Tensor
    """(B, T) int64, `IGNORE_INDEX` where nothing is asked."""
    text_lengths: torch.Tensor
    """(B,) int64 real positions of the text row."""
    mel_inputs: torch.Tensor
    """(B, C) int64."""
    mel_targets: torch.Tensor
    """(B, C) int64, `IGNORE_INDEX` where nothing is asked."""
    mel_lengths: torch.Tensor
    """(B,) int64 real positions of the mel row."""
    conditioning_mel: torch.Tensor
    """(N, K, 80, F) float32."""
    conditioning_rows: torch.Tensor | None
    """(B,) int64 which of them each row hears; None if every row has its own."""
    indices: torch.Tensor
    """(B,) int64 rows of the examples."""
    packing: Packing
    """Where the real positions go."""
    num_text_targets: int
    """Text targets that count."""
    num_mel_targets: int
    """Mel targets that count."""

    def model_inputs(self) -> dict[str, torch.Tensor | Packing | None]:
        """What the GPT's forward takes, by name."""
        names = ("text_inputs", "mel_inputs", "conditioning_mel", "conditioning_rows")
        names += ("packing", "text_targets", "mel_targets")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for faster copies to a GPU; `DataLoader` calls this."""
        return self.map(torch.Tensor.pin_memory)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same batch with other tensors."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {name: function(v) if isinstance(v, torch.Tensor) else v for name, v in values.items()}
        return Batch(**values | {"packing": self.packing.map(function)})


@dataclass(frozen=True)
class Collator:
    """Stacks examples, padded to the longest of their micro-batch, and says where each position goes."""

    start_text_id: int
    stop_text_id: int
    start_mel_id: int
    stop_mel_id: int
    max_text_ids: int
    """Text ids the GPT's position table has room for, besides START and STOP."""
    max_mel_codes: int
    """Mel codes it has room for, besides START and STOP."""
    padding: Literal["mask", "stop"] = "mask"

    @classmethod
    def for_model(cls, config: GPTConfig, padding: Literal["mask", "stop"] = "mask") -> Collator:
        """A collator with the ids and limits of a GPT."""
        return cls(
            start_text_id=config.start_text_id,
            stop_text_id=config.stop_text_id,
            start_mel_id=config.start_mel_id,
            stop_mel_id=config.stop_mel_id,
            max_text_ids=config.max_text_tokens,
            max_mel_codes=config.max_mel_tokens,
            padding=padding,
        )

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Pad and stack.

        Args:
            examples: B of them, with the same number of conditioning clips.

        Returns: the batch; rows of weight 0 have no targets.

        Raises: UserError: if a row is longer than the GPT's position tables.
        """
        for example in examples:
            self._check_room(example)
        pad = self._pad_with_mask if self.padding == "mask" else self._pad_with_stop
        text, mel = pad(examples)
        fillers = torch.tensor([example.weight == 0 for example in examples])
        text.targets[fillers] = IGNORE_INDEX
        mel.targets[fillers] = IGNORE_INDEX
        return Batch(
            text_inputs=text.inputs,
            text_targets=text.targets,
            text_lengths=text.lengths,
            mel_inputs=mel.inputs,
            mel_targets=mel.targets,
            mel_lengths=mel.lengths,
            **_conditioning(examples),
            indices=torch.tensor([example.index for example in examples]),
            packing=pack(text.lengths, mel.lengths, text.targets, mel.targets),
            num_text_targets=int((text.targets != IGNORE_INDEX).sum()),
            num_mel_targets=int((mel.targets != IGNORE_INDEX).sum()),
        )

    def _check_room(self, example: Example) -> None:
        for what, found, limit in (
            ("text ids", len(example.text_ids), self.max_text_ids),
            ("mel codes", len(example.mel_codes), self.max_mel_codes),
        ):
            if found > limit:
                raise UserError(
                    f"Example {example.index} has {found} {what}, but the model has positions for {limit}; lower "
                    f"data.{'max_text_ids' if what == 'text ids' else 'max_samples'} to leave such clips out."
                )

    def _pad_with_mask(self, examples: Sequence[Example]) -> tuple[_Rows, _Rows]:
        # After its STOP the text row shows one more, which asks for nothing: so it stands between text and speech when
        # the model speaks (START ids 0 0). Only a row that fills the whole position table has no room for it.
        text = _Rows.ignoring(len(examples), [min(len(e.text_ids), self.max_text_ids - 1) + 3 for e in examples])
        mel = _Rows.ignoring(len(examples), [len(e.mel_codes) + 1 for e in examples])
        for row, example in enumerate(examples):
            text.fill(row, self.start_text_id, example.text_ids, self.stop_text_id)
            mel.fill(row, self.start_mel_id, example.mel_codes, self.stop_mel_id)
        text.inputs[text.inputs == IGNORE_INDEX] = self.stop_text_id
        mel.inputs[mel.inputs == IGNORE_INDEX] = self.stop_mel_id
        return text, mel

    def _pad_with_stop(self, examples: Sequence[Example]) -> tuple[_Rows, _Rows]:
        # A clip of num_samples // 1024 = L keeps L + 1 codes where there is room; the longest of the batch only L.
        num_text_ids = max(len(example.text_ids) for example in examples)
        num_codes = max(len(example.mel_codes) for example in examples) - 1
        text = _Rows.ignoring(len(examples), [num_text_ids + 2] * len(examples))
        mel = _Rows.ignoring(len(examples), [num_codes + 2] * len(examples))
        for row, example in enumerate(examples):
            text.fill(row, self.start_text_id, example.text_ids, self.stop_text_id)
            mel.fill(row, self.start_mel_id, example.mel_codes[:num_codes], self.stop_mel_id)
        for rows, stop_id in ((text, self.stop_text_id), (mel, self.stop_mel_id)):
            rows.inputs[rows.inputs == IGNORE_INDEX] = stop_id
            rows.targets[rows.targets == IGNORE_INDEX] = stop_id
        return text, mel


def _conditioning(examples: Sequence[Example]) -> dict[str, torch.Tensor | None]:
    """Each conditioning once, and who hears which."""
    mels: list[np.ndarray] = []
    place_of: dict[int, int] = {}
    rows = []
    for example in examples:
        place = place_of.get(example.conditioning_of)
        if place is None:
            place = len(mels)
            mels.append(example.conditioning_mel)
            if example.conditioning_of is not None:
                place_of[example.conditioning_of] = place
        rows.append(place)
    shared = len(mels) < len(examples)
    return {
        "conditioning_mel": torch.from_numpy(np.stack(mels)),
        "conditioning_rows": torch.tensor(rows) if shared else None,
    }


@dataclass
class _Rows:
    """Inputs and targets of one kind of token, (B, length) int64, being filled."""

    inputs: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def ignoring(cls, num_rows: int, lengths: list[int]) -> _Rows:
        inputs = torch.full((num_rows, max(lengths)), IGNORE_INDEX)
        return cls(inputs, inputs.clone(), torch.tensor(lengths))

    def fill(self, row: int, start_id: int, content: np.ndarray, stop_id: int) -> None:
        """Inputs START content, targets content STOP; the rest stays to be ignored or padded."""
        count = len(content)
        ids = torch.from_numpy(content.astype(np.int64))
        self.inputs[row, 0] = start_id
        self.inputs[row, 1 : count + 1] = ids
        self.targets[row, :count] = ids
        self.targets[row, count] = stop_id
