"""Computes an importance matrix from a checkpoint, layer by layer: no 16-bit GGUF, no llama.cpp.

What llama-imatrix gets by running the GGUF file, from the checkpoint itself and with one decoder
layer in memory. See importance.py for what the numbers are and for the file.
"""

import re
from collections.abc import Callable

import numpy as np
import torch

from quant.architectures import EXPERT_PARTS, Architecture, find_architecture
from quant.calibration.passes import UNKEPT, Pass, Passes
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens

_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(\w+)")


class Sums:
    """Sums of squared inputs and tokens seen, by GGUF name of the weight."""

    def __init__(self, architecture: Architecture, n_experts: int):
        self._architecture, self._n_experts = architecture, n_experts
        self.squares: dict[str, np.ndarray] = {}  # float64 (n_matrices, n_columns)
        self.n_tokens: dict[str, np.ndarray] = {}  # int64 (n_matrices,)

    def add(self, linear: str, x: torch.Tensor) -> None:
        """Inputs x (..., n_columns) of a linear, by its full dotted name."""
        name, expert, n_matrices = self._place(linear)
        if name is None:
            return
        x = x.reshape(-1, x.shape[-1]).float()
        squares = x.square().sum(dim=0).cpu().numpy()  # float64 only over micro-batches
        if name not in self.squares:
            self.squares[name] = np.zeros((n_matrices, len(squares)))
            self.n_tokens[name] = np.zeros(n_matrices, np.int64)
        self.squares[name][expert] += squares
        self.n_tokens[name][expert] += len(x)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, to be kept for another run."""
        parts = {"squares": self.squares, "tokens": self.n_tokens}
        return {f"{kind} {name}": a for kind, of in parts.items() for name, a in of.items()}

    def restore(self, walk: Pass) -> None:
        """What an earlier run kept."""
        parts = {"squares": (self.squares, np.float64), "tokens": (self.n_tokens, np.int64)}
        for key, shape in walk.arrays.items():
            kind, _, name = key.partition(" ")
            if kind in parts:
                of, dtype = parts[kind]
                of[name] = np.empty(shape, dtype)
                walk.restore(key, of[name])

    def _place(self, linear: str) -> tuple[str | None, int, int]:
        """The weight's GGUF name (None: it is never quantized), matrix, and number of matrices."""
        _, _, layer, inner = linear.split(".", 3)  # model.layers.N.inner
        if found := _EXPERT.fullmatch(inner):
            part = EXPERT_PARTS[found[2]]
            return f"blk.{layer}.{part}.weight", int(found[1]), self._n_experts
        part = self._architecture.layer.get(f"{inner}.weight")
        if part is None or "gate_inp" in part:  # a router's weight is small, and stays F32
            return None, 0, 1
        return f"blk.{layer}.{part}", 0, 1


def measure_importance(
    model: StreamedModel,
    tokens: Tokens,
    progress: Callable[[int], None] = lambda layer: None,
    passes: Passes = UNKEPT,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Sums of squares float32 (n_matrices, n_columns) and tokens (n_matrices,), by GGUF name.

    For write_importance. The output layer is left out, as llama-imatrix does: llama.cpp found its
    importance to do more harm than good. Calls progress(layers done).
    """
    config = model.checkpoint.config
    n_experts = config.get("num_experts") or config.get("num_local_experts") or 1
    sums = Sums(find_architecture(config), n_experts)
    walk = passes.begin("imatrix", model.n_layers)
    sums.restore(walk)
    hidden = model.embed(tokens.ids)
    if not walk.finished:
        walk.restore("hidden", hidden.tensor)
    if walk.n_done:
        progress(walk.n_done)
    for layer in model.layers(tokens.seq_len, n_done=walk.n_done):
        with layer.watched(sums.add):
            layer.run(hidden, hidden)
        walk.done({"hidden": hidden.tensor}, sums.arrays())
        progress(layer.index + 1)
    squares = {name: values.astype(np.float32) for name, values in sums.squares.items()}
    return squares, sums.n_tokens
