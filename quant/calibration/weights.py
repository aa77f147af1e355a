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

_VIEWS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Stored types whose bytes torch can take as they are."""

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


class CheckpointWeights:
    """The weights of a 16-bit, 32-bit or FP8 checkpoint. Safe to use from several threads."""

    def __init__(self, checkpoint: Checkpoint):
        self._tensors = checkpoint.tensors
        self._reader = TensorReader()

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name in self._tensors:
            return self._tensors[name].shape
        if (parts := self._expert_parts(name)) is None:
            return None
        first = parts[0]
        return (len(parts), sum(info.shape[0] for info in first), first[0].shape[1])

    def read(self, name: str) -> torch.Tensor:
        """Raises BadInput if the tensor is missing, cannot be read, or holds NaN or infinity."""
        if name in self._tensors:
            info = self._tensors[name]
            return self._read(info, 0, info.n_rows).reshape(info.shape)
        if (parts := self._expert_parts(name)) is None:
            raise BadInput(
                f"The checkpoint has no {printable(name)}.",
                "The model that config.json describes needs it.",
            )
        experts = [torch.cat([self._read(info, 0, info.n_rows) for info in e]) for e in parts]
        return torch.stack(experts)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._read(self._tensors[name], start, stop)

    def _read(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), (stop - start, n_columns)."""
        if info.dtype in _VIEWS:
            stored = self._reader.read_stored(info, start, stop)
            rows = torch.from_numpy(stored.view(f"i{stored.itemsize}")).view(_VIEWS[info.dtype])
        else:
            rows = torch.from_numpy(self._reader.read_float32(info, start, stop))
        if not torch.isfinite(rows.sum(dtype=torch.float32)) and not torch.isfinite(rows).all():
            n_bad = int((~torch.isfinite(rows)).sum())
            raise BadInput(
                f"{printable(info.name)} has {n_bad} NaN or infinite weights.",
                "A model with such weights gives NaN for every text.",
                "Download the checkpoint again, or ask its maker.",
            )
        return rows

    def _expert_parts(self, name: str) -> list[list[TensorInfo]] | None:
        """The stored tensors of `...mlp.experts.gate_up_proj` or `.down_proj`, by expert."""
        before, found, part = name.partition(_EXPERTS)
        if not found:
            return None
        stored = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(part)
        experts: list[list[TensorInfo]] = []
        while stored is not None:
            prefix = f"{before}{_EXPERTS}{len(experts)}."
            names = [f"{prefix}{each}.weight" for each in stored]
            if not all(each in self._tensors for each in names):
                break
            experts.append([self._tensors[each] for each in names])
        return experts or None


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
