"""The weights of a written GPTQ folder, decoded."""

import json
from pathlib import Path

import numpy as np
import torch

from quant.calibration.weights import StoredTensors
from quant.checkpoint import CONFIG
from quant.formats.gptq import Gptq
from quant.safetensors_file import read_header
from quant.tensors import TensorInfo, TensorReader

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqWeights:
    """Tensors of a folder whose linears are GPTQ integers, by their plain names."""

    def __init__(self, folder: Path):
        config = json.loads((folder / CONFIG).read_text("utf-8"))["quantization_config"]
        self._format = Gptq(config["bits"], config["group_size"], config["sym"])
        self._tensors: dict[str, TensorInfo] = {}
        for path in folder.glob("*.safetensors"):
            self._tensors |= read_header(path)[0]
        self._reader = TensorReader()
        self._stored = StoredTensors(self._tensors)

    def shape(self, name: str) -> tuple[int, ...] | None:
        qweight = self._tensors.get(f"{name.removesuffix('weight')}qweight")
        if qweight is None:
            return self._stored.shape(name)
        return qweight.shape[1], qweight.shape[0] * self._format.per_word

    def read(self, name: str) -> torch.Tensor:
        if name in self._tensors:
            return self._stored.read(name)
        parts = {part: self._part(f"{name.removesuffix('weight')}{part}") for part in PARTS}
        return torch.from_numpy(self._format.decode(parts, self.shape(name)))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Of a tensor that is not quantized, as the embedding and the output matrix always are."""
        return self._stored.read_rows(name, start, stop)

    def _part(self, name: str) -> np.ndarray:
        info = self._tensors[name]
        return self._reader.read_stored(info, 0, info.n_rows).reshape(info.shape)
