"""The weights of a written bitsandbytes folder, decoded as bitsandbytes decodes them."""

from math import prod
from pathlib import Path

import torch

from quant.calibration.weights import StoredTensors
from quant.checkpoint import read_tensors
from quant.display import printable
from quant.errors import BadInput
from quant.formats.nf4 import QUANT_MAPS, Bnb4bit
from quant.strict_files import parse_json
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
                if weight not in tensors:
                    raise _damaged(tensors[name], f"there is no {printable(weight)}")
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
        self._check_parts(name, format, tuple(state["shape"]))
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
        """bitsandbytes' JSON about a 4-bit weight. Raises BadInput if it is none."""
        (info,) = (i for suffix, i in self._parts[name].items() if _STATE[1:] in suffix)
        state = parse_json(self._stored.read(info.name).numpy().tobytes(), info.path, info.name)
        shape = state.get("shape")
        if not (
            state.get("quant_type") in QUANT_MAPS
            and state.get("dtype") in ("bfloat16", "float16", "float32")
            and type(state.get("blocksize")) is int
            and 32 <= state["blocksize"] <= 4096
            and isinstance(shape, list)
            and len(shape) == 2
            and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
            and isinstance(state.get("nested_offset", 0.0), float)
        ):
            raise _damaged(info, "it says what bitsandbytes never writes")
        return state

    def _check_parts(self, name: str, format: Bnb4bit, shape: tuple[int, int]) -> None:
        """Raise BadInput unless everything is there, and as large as it must be."""
        for suffix, (_, wanted) in format.parts(shape).items():
            info = self._parts[name].get(suffix)
            if info is None:
                raise _damaged(self._parts[name][""], f"there is no {suffix} of it")
            if _STATE[1:] not in suffix and info.n_weights != prod(wanted):
                raise _damaged(info, f"it has {info.n_weights} values instead of {prod(wanted)}")


def _damaged(info: TensorInfo, why: str) -> BadInput:
    return BadInput(
        f"{printable(info.name)} in {printable(info.path.name)} cannot be decoded: {why}.",
        "",
        "Download the folder again, or make it anew.",
    )
