"""The weights of a written bitsandbytes folder, decoded as bitsandbytes decodes them."""

import json
from pathlib import Path

import torch

from quant.calibration.weights import StoredTensors
from quant.checkpoint import read_tensors
from quant.formats.nf4 import Bnb4bit
from quant.tensors import TensorInfo

_STATE = ".quant_state.bitsandbytes__"


class Bnb4bitWeights:
    """Tensors of a folder whose linears are 4-bit, wholly or in part, by their plain names."""

    def __init__(self, folder: Path):
        tensors = read_tensors(folder)
        self._stored = StoredTensors(tensors)
        self._parts: dict[str, dict[str, TensorInfo]] = {}
        for name in tensors:
            weight, found, _ = name.partition(_STATE)
            if found:
                self._parts[weight] = {
                    other.removeprefix(weight).removeprefix("."): info
                    for other, info in tensors.items()
                    if other == weight or other.startswith(f"{weight}.")
                }

    @property
    def names(self) -> list[str]:
        """Of all weights; a 4-bit one's scales are none."""
        parts = {info.name for of in self._parts.values() for info in of.values()}
        return [*self._parts, *(name for name in self._stored.names if name not in parts)]

    def is_4bit(self, name: str) -> bool:
        return name in self._parts

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self._parts:
            return self._stored.shape(name)
        return tuple(self._state(name)["shape"])

    def read(self, name: str) -> torch.Tensor:
        if name not in self._parts:
            return self._stored.read(name)
        state = self._state(name)
        format = Bnb4bit(state["quant_type"], "nested_offset" in state, state["blocksize"])
        parts = {
            suffix: self._stored.read(info.name).numpy()
            for suffix, info in self._parts[name].items()
        }
        w = format.decode(parts, tuple(state["shape"]))
        return torch.from_numpy(w).to(getattr(torch, state["dtype"]))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Of a tensor that is not 4-bit, as the embedding and the output matrix always are."""
        return self._stored.read_rows(name, start, stop)

    def _state(self, name: str) -> dict:
        """bitsandbytes' JSON about a 4-bit weight."""
        (info,) = (i for suffix, i in self._parts[name].items() if _STATE[1:] in suffix)
        return json.loads(self._stored.read(info.name).numpy().tobytes())
