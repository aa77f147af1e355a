"""What a run of a model takes, one decoder layer at a time: memory, temporary files, and how long.

Arithmetic on the headers of the checkpoint. What a command does to every layer is a `Work`, in
plain forwards of it; works are added up. torch is imported where there are any, and only there.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from quant.checkpoint import Checkpoint
from quant.convert import worker_count
from quant.estimates import Estimate, core_speed, reading_seconds, seconds_of
from quant.groups import find_groups
from quant.preflight import SMALL_NBYTES, Needs, available_memory, measure_needs
from quant.source import source_files
from quant.tensors import TensorInfo
from quant.texts import Texts

BASE_NBYTES, TORCH_NBYTES = 240 << 20, 210 << 20
"""Python, numpy and what is encoded at a time; torch, transformers and the tokenizer."""

ROUNDING_NBYTES = 220 << 20
"""numba, and the encoders that it compiled or loads, in a process that has torch besides."""

SPARE = 1.1
"""What the allocator keeps, in holes that fit nothing else."""

STARTING_SECONDS = 5.0
"""Importing torch and transformers, and tokenizing, on a core of the benchmarks' machine."""

LOADED_A_SECOND = 2e8
"""Weights of a layer made ready in the compute type, looked through for NaN, on such a core."""

OVERHEAD = 1.3
"""What a layer takes over its products: norms, rotary angles, softmax, memory."""

LOGIT_SECONDS = 12e-9
"""For each logit besides its product: exponentials, random numbers, maxima; on such a core."""

CHARACTERS_A_TOKEN = 2.5
"""Of a text, at the least: about how many tokens a short one has is known before it is cut."""

TRIED, TRIED_ON_GPU = 1 << 26, 1 << 32
"""Multiply-adds of a product that is timed: a millisecond, which is seldom interrupted."""

OF_MORE_THREADS = 0.8
"""So much of a thread's speed does each of several bring, as a power: they share the memory."""

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Work:
    """What is done with a model on a text, counted in what a forward of all its tokens takes."""

    forwards: float  # through all layers; a backward pass is one more
    loads: int = 1  # of all layers
    heads: float = 0.0  # products of all positions with the output matrix
    roundings: int = 0  # of all linears, each at `rounded_a_second`
    rounded_a_second: float = 1.5e8  # weights, of a core of the benchmarks' machine
    n_states: int = 1  # hidden states of all tokens that are held at once
    keeps_layers: bool = False  # the states of every layer, in a file
    feedback: bool = False  # H of every group, and its errors fed back
    saved: int = 2  # states beside the output, for a run that goes on; more with keeps_layers
    saves_sums: bool = False  # beside each of them, a float64 for every input of every matrix
    sweeps: bool = False  # rather than put states into files, it runs the model more often
    n_tokens: int = 0  # of a text of its own, if it is not the calibration text


IMPORTANCE = Work(1.1, saves_sums=True)
KV_SCALES = Work(1.0)
FEEDBACK = Work(2.4, feedback=True)
"""A layer runs once for each group, as far as that, and once to its end."""

GRADIENT = Work(4.0, loads=2, heads=3.0, roundings=1, keeps_layers=True)
"""Forwards; then forwards, backwards, and the outputs of what the rounding changed."""

LOCAL = Work(2.0, roundings=1)
BLOCK = Work(4.0, n_states=2)
"""Besides LOCAL: a layer runs once for each group."""


def of_metrics(metrics: Iterable[str], checkpoint: Checkpoint) -> list[Work]:
    """What measuring takes; all metrics share the first sweep. kld: each group runs to the end."""
    metrics = set(metrics)
    works = [LOCAL if metrics - {"weight"} else Work(0.0, roundings=1, n_states=0)]
    if "block" in metrics:
        works.append(BLOCK)
    if "gradient" in metrics:
        works.append(GRADIENT)
    if "kld" in metrics:
        n_groups = len(find_groups(checkpoint.tensors.values()))
        kld = Work(n_groups / 2, heads=n_groups, roundings=1, n_states=n_groups, sweeps=True)
        works.append(kld)
    return works


def of_check(n_models: int, n_tokens: int) -> Work:
    """Models on a held-out text, half of which is scored; one of them is rounded as it is read."""
    return Work(
        float(n_models),
        loads=n_models,
        heads=n_models / 2,
        roundings=1,
        n_states=n_models,
        saved=n_models + 1,
        n_tokens=n_tokens,
    )


def tokens_at_most(texts: Texts, n_tokens: int) -> int:
    """About how many tokens are cut from a text of which n_tokens are wanted."""
    n_characters = sum(len(record.text) for record in texts.records)
    return max(1, min(n_tokens, int(n_characters / CHARACTERS_A_TOKEN)))


@dataclass(frozen=True)
class Sizes:
    """Of a checkpoint, in weights."""

    n_layers: int
    layers: int  # of all decoder layers
    used: float  # of them, what one token passes through: not all experts
    largest_layer: int
    largest_matrix: int  # of those that are read as one
    linears: int  # of all groups
    largest_linears: int  # of one layer's groups
    hidden: int
    intermediate: int
    widest: int  # inputs of a linear
    n_vocab: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Sizes":
        config, tensors = checkpoint.config, checkpoint.tensors
        by_layer: dict[int, list[TensorInfo]] = {}
        for name, info in tensors.items():
            if match := _LAYER.search(name):
                by_layer.setdefault(int(match[1]), []).append(info)
        inside = [info for infos in by_layer.values() for info in infos]
        experts = sum(info.n_weights for info in inside if _EXPERT.search(info.name))
        n_experts = config.get("num_experts") or config.get("num_local_experts") or 1
        share = (config.get("num_experts_per_tok") or n_experts) / n_experts
        layers = sum(info.n_weights for info in inside)
        matrices = [info for info in inside if len(info.shape) == 2]
        groups = _linears_by_layer(tensors)
        embedding = tensors.get("model.embed_tokens.weight")
        hidden = config.get("hidden_size") or 1
        return cls(
            n_layers=len(by_layer),
            layers=layers,
            used=layers - (1 - share) * experts,
            largest_layer=_most(sum(i.n_weights for i in infos) for infos in by_layer.values()),
            largest_matrix=_most([*map(_read_at_once, by_layer.values())]),
            linears=sum(groups.values()),
            largest_linears=_most(groups.values()),
            hidden=hidden,
            intermediate=max(config.get("intermediate_size") or 0, 4 * hidden),
            widest=_most(info.n_columns for info in matrices),
            n_vocab=embedding.n_rows if embedding else 1,
        )


def numbers_nbytes(checkpoint: Checkpoint) -> int:
    """Bytes, at most, of an output that says something of each matrix, and of its columns."""
    matrices = [info for info in checkpoint.tensors.values() if len(info.shape) == 2]
    return sum(1000 + 4 * info.n_columns for info in matrices)


def _sums_nbytes(checkpoint: Checkpoint) -> int:
    """Of a sum for every input of every matrix in a layer, and a number of tokens."""
    inner = (info for name, info in checkpoint.tensors.items() if _LAYER.search(name))
    return 8 * sum(1 + info.n_columns for info in inner if len(info.shape) == 2)


def _linears_by_layer(tensors: dict[str, TensorInfo]) -> dict[int, int]:
    """Weights of each layer's groups."""
    found: dict[int, int] = {}
    for group in find_groups(tensors.values()):
        n = sum(tensors[f"{name}.weight"].n_weights for name in group.modules)
        found[group.layer] = found.get(group.layer, 0) + n
    return found


def _read_at_once(infos: list[TensorInfo]) -> int:
    """Weights of the largest parameter of a layer; of its experts, two thirds are one."""
    experts = sum(info.n_weights for info in infos if _EXPERT.search(info.name))
    return max(2 * experts // 3, _most(i.n_weights for i in infos if not _EXPERT.search(i.name)))


def _most(numbers: Iterable[int]) -> int:
    return max(numbers, default=0)


@dataclass(frozen=True)
class _States:
    """Bytes of hidden states."""

    held: int  # in memory
    in_files: int  # temporary ones
    saved: int  # beside the output


# --- one run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerwiseRun:
    """Works on a checkpoint, one after the other, and an output of `nbytes`."""

    checkpoint: Checkpoint
    works: tuple[Work, ...]
    n_tokens: int  # of the calibration text
    seq_len: int
    device: str
    output: Path
    nbytes: int
    saves: bool = False  # states for a run that goes on are kept beside the output meanwhile

    def needs(self) -> Needs:
        """Of a GPU's own memory nothing is said: it takes a layer in 16 bits. Raises CannotCreate
        if there is no folder for the output."""
        sizes, states = Sizes.of(self.checkpoint), [self._states(work) for work in self.works]
        at_work = [
            TORCH_NBYTES + round(SPARE * (state.held + self._at_work(work, sizes)))
            for work, state in zip(self.works, states, strict=True)
        ]
        saved = max((state.saved for state in states), default=0) if self.saves else 0
        if saved and any(work.feedback for work in self.works):
            saved += self._hidden_nbytes(self.n_tokens)  # its last ones stay to the end
        return measure_needs(
            self.output,
            disk=self.nbytes + saved + SMALL_NBYTES,
            memory=BASE_NBYTES + max(at_work, default=0),
            temporary=max((state.in_files for state in states), default=0),
        )

    def estimate(self, besides: float = 0.0) -> Estimate:
        """How long all take, and `besides` seconds. A product of the shape that a layer has is
        tried here, and a little of all else."""
        if not self.works:
            return Estimate(besides)
        sizes, speed = Sizes.of(self.checkpoint), core_speed()
        rate = products_a_second(sizes.hidden, sizes.intermediate, self.seq_len, self.device)
        files = source_files(self.checkpoint)
        read = reading_seconds(files, sum(path.stat().st_size for path in files))
        of_cores = besides * speed + STARTING_SECONDS  # on a core of the benchmarks' machine
        products, loads = 0.0, 0
        for work in self.works:
            n = work.n_tokens or self.n_tokens
            attention = sizes.n_layers * self.seq_len * sizes.hidden
            products += OVERHEAD * work.forwards * (sizes.used + attention) * n
            products += work.heads * sizes.n_vocab * sizes.hidden * n
            loads += work.loads
            if self.device == "cpu":
                of_cores += work.heads * sizes.n_vocab * n * LOGIT_SECONDS
            rounded = work.roundings * sizes.linears
            of_cores += rounded / work.rounded_a_second / worker_count()
            if work.feedback:
                products += _feedback_products(self.checkpoint, n)
                of_cores += sizes.linears * FED_BACK_SECONDS
        of_cores += loads * sizes.layers / LOADED_A_SECOND
        return Estimate(products / rate + of_cores / speed + loads * read)

    @property
    def _width(self) -> int:
        """Bytes of a number in the compute type."""
        return 4 if self.device == "cpu" else 2

    def _states(self, work: Work) -> _States:
        """Of one work, see HiddenStates."""
        from quant.calibration.hidden_states import SHARE_OF_MEMORY
        from quant.measuring.kld import n_together

        nbytes = self._hidden_nbytes(work.n_tokens or self.n_tokens)
        room = int(SHARE_OF_MEMORY * available_memory())
        n_held = min(work.n_states, room // max(1, nbytes))
        n_in_files, n_saved = work.n_states - n_held, work.saved
        if work.sweeps:
            n_held = 1 + min(work.n_states, n_together(nbytes))  # with the reference
            n_in_files, n_saved = 0, 2 * n_held
        if work.keeps_layers and self.saves:  # the file of all layers is what is gone on from
            n_saved += Sizes.of(self.checkpoint).n_layers + 1
        elif work.keeps_layers:
            n_in_files += Sizes.of(self.checkpoint).n_layers
        saved = n_saved * nbytes
        if work.saves_sums:
            saved += work.saved * _sums_nbytes(self.checkpoint)
        return _States(n_held * nbytes, n_in_files * nbytes, saved)

    def _hidden_nbytes(self, n_tokens: int) -> int:
        """Of the states of so many tokens between two layers."""
        return n_tokens * (self.checkpoint.config.get("hidden_size") or 1) * self._width

    def _at_work(self, work: Work, sizes: Sizes) -> int:
        """Bytes besides: the layer, what is read for it, activations, and what is made of it."""
        from quant.calibration.streamed_model import (
            ACTIVATION_NBYTES,
            ACTIVATIONS,
            HEAD_BLOCK_NBYTES,
        )

        on_cpu = self.device == "cpu"
        layer = self._width * (sizes.largest_layer if on_cpu else sizes.largest_matrix)
        made = 2 * sizes.largest_matrix
        if work.roundings:
            made += ROUNDING_NBYTES + 2 * sizes.largest_linears + 8 * sizes.largest_matrix
        if work.feedback:
            made += ROUNDING_NBYTES + 12 * sizes.widest**2 + 16 * sizes.largest_matrix
        if work.forwards and on_cpu:
            of_one = ACTIVATIONS * self.seq_len * sizes.intermediate * self._width
            made += max(ACTIVATION_NBYTES, of_one) * (2 if work.keeps_layers else 1)
        if work.heads:
            made = max(made, 4 * HEAD_BLOCK_NBYTES)
        return layer + made


FED_BACK_SECONDS = 60e-9
"""For each weight that is rounded with error feedback, besides products."""


def _feedback_products(checkpoint: Checkpoint, n_tokens: int) -> float:
    """Multiplications for H of every group, its factors, and the errors of every linear."""
    total = 0.0
    for group in find_groups(checkpoint.tensors.values()):
        shapes = [checkpoint.tensors[f"{name}.weight"].shape for name in group.modules]
        n = shapes[0][1]
        total += n_tokens * n**2 + sum(n**3 + rows * n**2 / 2 for rows, _ in shapes)
    return total


def products_a_second(hidden: int, intermediate: int, seq_len: int, device: str) -> float:
    """Multiply-adds a second in a product of a layer's shape, but of TRIED's size.

    On a CPU one thread is tried: several wait for each other, and where other programs want the
    cores, too, a trial of two was seen at anything between 1/400 of their speed and all of it.
    """
    import torch
    from torch.nn import functional as F

    rows = min(seq_len, 256)
    size, dtype = (TRIED, torch.float32) if device == "cpu" else (TRIED_ON_GPU, torch.bfloat16)
    columns = min(intermediate, max(64, size // (rows * hidden)))
    x = torch.ones(rows, hidden, dtype=dtype, device=device)
    w = torch.ones(columns, hidden, dtype=dtype, device=device)

    def product() -> None:
        y = F.linear(x, w)
        if y.is_cuda:
            torch.cuda.synchronize()

    n_products, n_threads = prod((rows, columns, hidden)), torch.get_num_threads()
    if device != "cpu":
        return n_products / seconds_of(product, 0.2)
    torch.set_num_threads(1)
    try:
        return n_products / seconds_of(product, 0.2) * n_threads**OF_MORE_THREADS
    finally:
        torch.set_num_threads(n_threads)
