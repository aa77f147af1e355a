"""What evaluate takes: room for the reference's distributions, memory for one model at a time, and
how long."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.calibration.needs import (
    BASE_NBYTES,
    LOADED_A_SECOND,
    STARTING_SECONDS,
    TORCH_NBYTES,
    products_a_second,
    tokens_at_most,
)
from quant.checkpoint import CONFIG, Checkpoint
from quant.durable import locks_of
from quant.errors import QwqQuantError
from quant.estimates import Estimate, core_speed, reading_seconds
from quant.evaluation.base_file import BaseFile, window_nbytes
from quant.evaluation.evaluate import PAGE, WORK, Model, is_base_file
from quant.evaluation.measuring import SCORES, Wishes, model_files
from quant.evaluation.runners.folder import WITH_ACTIVATIONS
from quant.evaluation.runners.stored import count_weights, find_weights, loaded_nbytes
from quant.gguf_file import open_gguf
from quant.preflight import SMALL_NBYTES, Needs, available_memory, measure_needs
from quant.report.files import REPORT_NBYTES

GGUF_NBYTES = 300 << 20
"""llama.cpp's buffers. The weights are mapped: of a file too large, the system drops what it likes,
and the run is slow."""

STREAMED_NBYTES = 1280 << 20
"""Logits and activations of a model that is run layer by layer."""

SCORED_SECONDS = 40e-9
"""For each logit: encoded, or read again and compared; on a core of the benchmarks' machine."""

DRAWN_A_SECOND = 6e9
"""Bytes of weights that pass by for each token of an answer."""


@dataclass(frozen=True)
class _Sizes:
    """Of one model as it is run."""

    files: list[Path]
    n_weights: int
    nbytes: int  # in memory
    n_vocab: int
    hidden: int


@dataclass(frozen=True)
class EvaluationRun:
    """A reference and candidates, and what is measured."""

    reference: Model
    candidates: Sequence[Model]
    wishes: Wishes
    output: Path
    device: str
    keeps_base: bool = False  # the distributions stay, in another file

    def needs(self) -> Needs:
        """Raises CannotCreate if there is no folder to make the report's in."""
        n_vocab, n_windows = self._reference_sizes()
        scored = n_windows * (self.wishes.n_ctx - 1 - self.wishes.n_ctx // 2)
        base = n_windows * window_nbytes(self.wishes.n_ctx, n_vocab)
        if is_base_file(self.reference.path):
            base = 0
        scores = scored * (8 + SCORES.itemsize * len(self.candidates))
        logits = 12 * n_vocab * self.wishes.n_ctx
        memory = max((sizes.nbytes for sizes in self._models()), default=0)
        return measure_needs(
            self.output,
            disk=(1 + self.keeps_base) * base + scores + REPORT_NBYTES + SMALL_NBYTES,
            memory=BASE_NBYTES + TORCH_NBYTES + memory + logits,
            in_place=True,
            reused=_nbytes(self.output / WORK),
            locks=locks_of(self.output / PAGE),
        )

    def estimate(self) -> Estimate:
        """Reading the text; answers as long as they may be; lm-eval's tasks are not counted."""
        n_vocab, _ = self._reference_sizes()
        n_tokens, n_ctx = self.n_tokens, self.wishes.n_ctx
        n_drawn, speed = self._drawn_tokens(), core_speed()
        seconds = 0.0
        for sizes in self._models():
            rate = products_a_second(sizes.hidden, 4 * sizes.hidden, n_ctx, self.device)
            read = reading_seconds(sizes.files, sum(path.stat().st_size for path in sizes.files))
            of_core = STARTING_SECONDS + sizes.n_weights / LOADED_A_SECOND
            of_core += SCORED_SECONDS * n_tokens / 2 * n_vocab
            seconds += of_core / speed + read + sizes.n_weights * n_tokens / rate
            seconds += n_drawn * sizes.nbytes / DRAWN_A_SECOND / speed
        return Estimate(seconds)

    @property
    def n_tokens(self) -> int:
        """About how many each model reads."""
        return self._reference_sizes()[1] * self.wishes.n_ctx

    def _reference_sizes(self) -> tuple[int, int]:
        """Tokens of the vocabulary, and windows of the text."""
        if is_base_file(self.reference.path):
            base = BaseFile.open(self.reference.path)
            return base.n_vocab, len(base.tokens)
        n_characters = sum(len(record.text) for record in self.wishes.texts.records)
        n_tokens = tokens_at_most(self.wishes.texts, self.wishes.n_tokens or n_characters)
        return _sizes_of(self.reference.path, self.device).n_vocab, max(
            1, n_tokens // self.wishes.n_ctx
        )

    def _drawn_tokens(self) -> int:
        loops, questions = self.wishes.loops, self.wishes.questions
        drawn = loops.n_answers * len(loops.profiles) * loops.limit if loops else 0
        return drawn + 256 * len(questions)

    def _models(self) -> list[_Sizes]:
        """Of all that run; one that is broken is the run's own to tell of."""
        found = []
        for model in (self.reference, *self.candidates):
            if not is_base_file(model.path):
                try:
                    found.append(_sizes_of(model.path, self.device))
                except QwqQuantError:
                    if model is self.reference:
                        raise
        return found


def _sizes_of(path: Path, device: str) -> _Sizes:
    """Raises BadInput, InputMissing or NotPermitted for what is no model."""
    files = model_files(path)
    if not path.is_dir():
        gguf = open_gguf(path)
        tokens = gguf.metadata.get("tokenizer.ggml.tokens")
        embedding = gguf.tensors.get("token_embd.weight")
        n_weights = sum(tensor.n_weights for tensor in gguf.tensors.values())
        n_vocab = len(tokens.data) if tokens else 1
        hidden = embedding.n_columns if embedding else 1
        return _Sizes(files, n_weights, GGUF_NBYTES, n_vocab, hidden)
    weights, config = find_weights(path), _config(path)
    needed = WITH_ACTIVATIONS * loaded_nbytes(path, weights, 4 if device == "cpu" else 2)
    n_weights = count_weights(weights) if weights else int(needed // 4)
    if device != "cpu":
        needed = 0  # of the machine's memory
    elif weights and needed > available_memory():  # it is run layer by layer
        needed = 2 * needed / max(1, _count(config, "num_hidden_layers")) + STREAMED_NBYTES
    vocab, hidden = _count(config, "vocab_size"), _count(config, "hidden_size")
    return _Sizes(files, n_weights, round(needed), vocab, hidden)


def _config(path: Path) -> dict:
    return Checkpoint(path, path.name, None, {}, {}).read_json(CONFIG) or {}


def _count(config: dict, name: str) -> int:
    """A number of config.json, or of its part about text."""
    inner = config.get("text_config")
    found = config.get(name) or (inner.get(name) if isinstance(inner, dict) else None)
    return found if isinstance(found, int) and found > 0 else 1


def _nbytes(folder: Path) -> int:
    """Of what an unfinished run left there, which is taken up."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
