"""Runs a folder that does not fit in memory, one decoder layer at a time.

All windows go through a layer before the next one is read, so a pass over 65 GB of weights serves
all of them. It cannot draw answers: each token would be such a pass.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from quant.calibration.streamed_model import StreamedModel
from quant.checkpoint import Checkpoint
from quant.display import printable
from quant.errors import Unavailable
from quant.evaluation.runners.folder import Talker
from quant.evaluation.runners.stored import StoredWeights
from quant.evaluation.streamed import final_states

LOGITS_NBYTES = 1 << 30
"""Logits of as many windows as fit are computed in one pass over the output matrix."""


class StreamedRunner(Talker):
    """A folder whose weights can be read, layer by layer."""

    can_answer = False

    def __init__(self, folder: Path, weights: StoredWeights, device: str):
        """Raises BadInput for a damaged or unknown model."""
        super().__init__(folder)
        model = Checkpoint(folder, folder.name, None, {}, {})
        self._model = StreamedModel(model, weights, device)
        self.n_vocab = self._model.n_vocab
        self.n_ctx_trained = getattr(self._model.config, "max_position_embeddings", None)
        self.eos = ()

    def __enter__(self) -> "StreamedRunner":
        return self

    def __exit__(self, *exc) -> None:
        self._model = None

    @torch.no_grad()
    def logits(self, inputs: np.ndarray, first: int) -> Iterator[np.ndarray]:
        n_ctx = inputs.shape[1]
        hidden = final_states(self._model, inputs)
        n_scored = n_ctx - 1 - first
        n_at_once = max(1, LOGITS_NBYTES // (4 * n_scored * self.n_vocab))
        for start in range(0, len(inputs), n_at_once):
            part = hidden.tensor[start : start + n_at_once, first:-1]  # (n, n_scored, hidden)
            x = self._model.norm(part.to(self._model.device))
            found = np.empty((*part.shape[:2], self.n_vocab), np.float32)
            for token, rows in self._model.head_blocks():
                block = (x @ rows.T).float().cpu().numpy()
                found[..., token : token + len(rows)] = block
            yield from found

    def begin(self, tokens: np.ndarray, n_ctx: int) -> np.ndarray:
        raise Unavailable(
            f"{printable(self.name)} is run layer by layer, for it does not fit in memory.",
            "So it cannot draw answers: each token would need all weights from the disk.",
            "Leave out --loops, --questions and --tasks, or use a machine with more memory.",
        )

    def go_on(self, token: int) -> np.ndarray:
        return self.begin(np.array([token]), 0)
