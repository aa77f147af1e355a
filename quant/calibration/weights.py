"""Where a streamed model's weights come from: a checkpoint as it is, or with some of them changed.

`Weights` is the one thing StreamedModel asks for weights by name, so a quantized copy of a model is
run by the same code as the model: only what `read` returns differs.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from quant.checkpoint import Checkpoint
from quant.display import printable
from quant.errors import BadInput
from quant.tensors import TensorInfo, TensorReader

_VIEWS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
}
"""Stored types whose bytes torch can take as they are."""

_SIGNED = {1: "u1", 2: "i2", 4: "i4"}
"""What numpy hands over to torch, by width, to be viewed there as what it is."""

_EXPERTS = ".mlp.experts."
"""transformers 5 keeps a layer's experts in one parameter; checkpoints store them one by one."""


class Weights(Protocol):
    """Tensors by Hugging Face name, shapes as in the checkpoint."""

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in any floating type, on the CPU."""

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a matrix."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape, or None if there is no such tensor."""


class StoredTensors:
    """Tensors as they are stored, in 16, 32 or FP8 bits. Safe to use from several threads.

    Experts that are stored one by one can be had as transformers 5 has them: one parameter.
    """

    def __init__(self, tensors: dict[str, TensorInfo]):
        self._tensors = tensors
        self._reader = TensorReader()

    @property
    def names(self) -> list[str]:
        """Of all tensors that can be read, as checkpoints name them."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name in self._tensors:
            return self._tensors[name].shape
        if not (experts := self._experts(name)):
            return None
        first = [self.shape(part) for part in experts[0]]
        return (len(experts), sum(shape[0] for shape in first), first[0][1])

    def read(self, name: str) -> torch.Tensor:
        """Raises BadInput if the tensor is missing, cannot be read, or holds NaN or infinity."""
        if name in self._tensors:
            info = self._tensors[name]
            return self.read_rows(name, 0, info.n_rows).reshape(info.shape)
        if not (experts := self._experts(name)):
            raise BadInput(
                f"The checkpoint has no {printable(name)}.",
                "The model that config.json describes needs it.",
            )
        return torch.stack([torch.cat([self.read(part) for part in e]) for e in experts])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), (stop - start, n_columns)."""
        info = self._tensors[name]
        if info.dtype in _VIEWS:
            stored = self._reader.read_stored(info, start, stop)
            rows = torch.from_numpy(stored.view(_SIGNED[stored.itemsize])).view(_VIEWS[info.dtype])
        else:
            rows = torch.from_numpy(self._reader.read_float32(info, start, stop))
        if rows.is_floating_point():
            _require_finite(info.name, rows)
        return rows

    def _has(self, name: str) -> bool:
        """Whether a tensor of that name is stored."""
        return name in self._tensors

    def _experts(self, name: str) -> list[list[str]]:
        """The stored names of `...mlp.experts.gate_up_proj` or `.down_proj`, by expert."""
        before, found, part = name.partition(_EXPERTS)
        stored = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(part)
        experts: list[list[str]] = []
        while found and stored:
            prefix = f"{before}{_EXPERTS}{len(experts)}."
            names = [f"{prefix}{each}.weight" for each in stored]
            if not all(self._has(each) for each in names):
                break
            experts.append(names)
        return experts


class CheckpointWeights(StoredTensors):
    """The weights of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint.tensors)


class ChangedWeights:
    """Other weights, of which some matrices pass through `change`: a rounding, say.

    change: (name, weight in any floating type) -> weight, same shape; called for `names` only.
    """

    def __init__(
        self,
        weights: Weights,
        names: frozenset[str],
        change: Callable[[str, torch.Tensor], torch.Tensor],
    ):
        self._weights, self._names, self._change = weights, names, change
        self.shape = weights.shape
        self.read_rows = weights.read_rows

    def read(self, name: str) -> torch.Tensor:
        w = self._weights.read(name)
        return self._change(name, w) if name in self._names else w


def _require_finite(name: str, rows: torch.Tensor) -> None:
    """Raise BadInput if there is a NaN or an infinity among them."""
    # The sum of finite weights is finite, and one pass over them is the cheapest look.
    if torch.isfinite(rows.sum(dtype=torch.float32)) or torch.isfinite(rows).all():
        return
    n_bad = int((~torch.isfinite(rows)).sum())
    raise BadInput(
        f"{printable(name)} has {n_bad} NaN or infinite weights.",
        "A model with such weights gives NaN for every text.",
        "Download the checkpoint again, or ask its maker.",
    )
