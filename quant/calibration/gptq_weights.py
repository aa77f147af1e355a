"""The weights of a GPTQ folder, decoded: ours, AutoGPTQ's, GPTQModel's."""

from dataclasses import replace
from pathlib import Path

import torch

from quant.calibration.weights import StoredTensors
from quant.checkpoint import CONFIG, Checkpoint, read_tensors
from quant.display import printable
from quant.errors import BadInput
from quant.formats.gptq import Gptq
from quant.tensors import TensorInfo

PARTS = ("qweight", "qzeros", "scales", "g_idx")

QUANTIZE_CONFIG = "quantize_config.json"
"""Where AutoGPTQ says how, before config.json's quantization_config did."""

CHECKPOINT_FORMATS = ("gptq", "gptq_v2")


class GptqWeights(StoredTensors):
    """Tensors of a folder whose linears are GPTQ integers, by their plain names."""

    def __init__(self, folder: Path):
        """Raises BadInput for a folder that is damaged, or says nothing or odd things of GPTQ."""
        super().__init__(read_tensors(folder))
        self._format = _read_format(folder)
        self._shown = printable(folder)

    @property
    def names(self) -> list[str]:
        """Of all weights; an integer weight's scales are none."""
        found = []
        for name in self._tensors:
            module, _, part = name.rpartition(".")
            if part == "qweight":
                found.append(f"{module}.weight")
            elif part not in PARTS or f"{module}.qweight" not in self._tensors:
                found.append(name)
        return found

    def shape(self, name: str) -> tuple[int, ...] | None:
        if (qweight := self._packed(name)) is None:
            return super().shape(name)
        if len(qweight.shape) != 2:
            raise self._damaged(name, f"its qweight has the shape {list(qweight.shape)}")
        return qweight.shape[1], qweight.shape[0] * self._format_of(name).per_word

    def read(self, name: str) -> torch.Tensor:
        if self._packed(name) is None:
            return super().read(name)
        parts = {}
        for part in PARTS:
            info = self._part(name, part)
            if info is not None:
                stored = self._reader.read_stored(info, 0, info.n_rows)
                parts[part] = stored.reshape(info.shape)
        try:
            return torch.from_numpy(self._format_of(name).decode(parts, self.shape(name)))
        except ValueError as error:
            raise self._damaged(name, str(error)) from None

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Quick for what is not quantized, as embedding and output matrix hardly ever are."""
        if self._packed(name) is None:
            return super().read_rows(name, start, stop)
        return self.read(name)[start:stop]

    def _packed(self, name: str) -> TensorInfo | None:
        """The integers of a quantized weight; None for any other tensor."""
        if name in self._tensors or not name.endswith("weight"):
            return None
        return self._part(name, "qweight")

    def _format_of(self, name: str) -> Gptq:
        """Of one weight: a layer whose bits are others (`dynamic` rules) shows it in its shapes."""
        qweight, g_idx = self._packed(name), self._part(name, "g_idx")
        if g_idx is None or qweight.shape[0] * self._format.per_word == g_idx.shape[0]:
            return self._format
        other = replace(self._format, bits=12 - self._format.bits)  # 8 for 4, 4 for 8
        return other if qweight.shape[0] * other.per_word == g_idx.shape[0] else self._format

    def _part(self, name: str, part: str) -> TensorInfo | None:
        return self._tensors.get(f"{name.removesuffix('weight')}{part}")

    def _has(self, name: str) -> bool:
        return super()._has(name) or self._packed(name) is not None

    def _damaged(self, name: str, why: str) -> BadInput:
        return BadInput(f"{printable(name)} of {self._shown} cannot be decoded.", f"{why}.")


def _read_format(folder: Path) -> Gptq:
    """What the folder says of its integers. Raises BadInput."""
    small = Checkpoint(folder, folder.name, None, {}, {})
    said = (small.read_json(CONFIG) or {}).get("quantization_config")
    said = said or small.read_json(QUANTIZE_CONFIG) or {}
    try:
        bits, group_size, symmetric = (said[key] for key in ("bits", "group_size", "sym"))
        stored_as = said.get("checkpoint_format", "gptq")
        kinds = type(bits), type(group_size), type(symmetric)
        if kinds != (int, int, bool) or stored_as not in CHECKPOINT_FORMATS:
            raise ValueError("bits, group_size, sym or checkpoint_format is of another kind")
        return Gptq(bits, group_size, symmetric, stored_as)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{printable(folder)} cannot be decoded as GPTQ.",
            f"Its quantization_config is not understood: {printable(error, 200)}.",
            "Folders of 4 and 8 bits in the formats gptq and gptq_v2 can be read.",
        ) from None
