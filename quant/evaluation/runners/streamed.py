"""Runs a folder that does not fit in memory, one decoder layer at a time.

All windows go through a layer before the next one is read, so a pass over 65 GB of weights serves
all of them. It cannot draw answers: each token would be such a pass. What a run that goes on needs
of a pass has a journal of its own, among the work of the evaluation.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from xxhash import xxh3_64_hexdigest

from quant.calibration.computed import device_name
from quant.calibration.hidden_states import HiddenStates
from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.streamed_model import StreamedModel
from quant.checkpoint import CONFIG, Checkpoint, read_tensors
from quant.display import printable
from quant.errors import Unavailable
from quant.evaluation.runners.stored import StoredWeights
from quant.evaluation.runners.talker import Talker
from quant.evaluation.streamed import final_states
from quant.fingerprint import fingerprint
from quant.journal import Journal, Resume
from quant.manifest import package_versions

LOGITS_NBYTES = 1 << 30
"""Logits of as many windows as fit are computed in one pass over the output matrix."""


class StreamedRunner(Talker):
    """A folder whose weights can be read, layer by layer."""

    can_answer = False

    def __init__(
        self,
        folder: Path,
        weights: StoredWeights,
        device: str,
        work: Path | None = None,
        say: Callable | None = None,
    ):
        """work, say: see open_runner. Raises BadInput for a damaged or unknown model."""
        super().__init__(folder)
        self._folder, self._work = folder, work
        self._say = say or (lambda *message: None)
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
    def logits(self, inputs: np.ndarray, first: int, n_done: int = 0) -> Iterator[np.ndarray]:
        with self._passes(inputs) as passes:
            self._say("begin", f"{printable(self.name)} passes by, layers", self._model.n_layers)
            hidden = final_states(self._model, inputs, passes, progress=self._advance)
            self._say("begin", f"{printable(self.name)} reads", len(inputs) - n_done)
            yield from self._windows(hidden, first, n_done)

    def _advance(self, n_layers: int) -> None:
        self._say("advance", n_layers)

    @contextmanager
    def _passes(self, inputs: np.ndarray) -> Iterator[Passes]:
        """Of the windows `inputs` over the layers. A run that goes on has the same windows, however
        many of them are done."""
        if self._work is None:
            yield UNKEPT
            return
        model = self._model
        decides = fingerprint(
            code=("calibration", "evaluation", "formats", "tensors.py"),
            hashed={
                "inputs": inputs,
                "config": (self._folder / CONFIG).read_bytes(),
                "tensors": read_tensors(self._folder),
            },
            device=device_name(model.device),
            **package_versions(),
        )
        name = f"layers-{xxh3_64_hexdigest(os.fsencode(self._folder.resolve()))}"
        with Journal(self._work / name, decides, Resume(), "layers", model.n_layers) as journal:
            passes = journal.hold(Passes(journal))
            journal.begin(passes.take_up(len(journal.units)))
            yield passes

    def _windows(self, hidden: HiddenStates, first: int, n_done: int) -> Iterator[np.ndarray]:
        """Logits of every window behind the first n, from the last layer's output."""
        n_scored = hidden.tensor.shape[1] - 1 - first
        n_at_once = max(1, LOGITS_NBYTES // (4 * n_scored * self.n_vocab))
        for start in range(n_done, len(hidden.tensor), n_at_once):
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
