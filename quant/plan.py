"""What each tensor becomes: arithmetic on headers, printable before any work is done."""

import re
from dataclasses import dataclass, field

import numpy as np

from quant.assembly import Assembly
from quant.formats.format import Format
from quant.gguf_file import DEFAULT_ALIGNMENT, padded

_LAYER = re.compile(r"\bblk\.(\d+)\.")


@dataclass(frozen=True)
class Assignment:
    """One tensor to write: what it is made of, in which format, and why."""

    source: Assembly
    format: Format
    rule: str  # why this format, in words
    importance: np.ndarray | None = None  # float32 (n_matrices, n_columns), from an imatrix
    error: float | None = None  # relative squared error of its output, where that decided
    damage: float = 0.0  # that error times what the tensor's output is worth
    step: "Step | None" = None  # to the next larger format
    is_copy: bool = False  # bytes of a GGUF file that pass as they are

    def importance_of(self, row: int) -> np.ndarray | None:
        """The importance of the matrix that `row` belongs to: one a stacked expert."""
        if self.importance is None:
            return None
        return self.importance[row * len(self.importance) // self.source.n_rows]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(self.source.shape)


@dataclass(frozen=True)
class Step:
    """What a larger format would cost, and how much less damage it would do."""

    format: str
    nbytes: int
    mends: float


@dataclass(frozen=True)
class TensorClass:
    """Tensors of one kind and format, folded for display: blk.*.ffn_down.weight as Q8_0."""

    name: str
    source_type: str
    format: str
    rule: str
    n_tensors: int
    n_weights: int
    nbytes: int
    layers: tuple[int, ...] = ()  # where measured errors chose the format, and so no pattern does
    damage: float | None = None  # of all of them, where that decided
    step: Step | None = None  # of all of them, if it is to one format

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.n_weights


@dataclass(frozen=True)
class Plan:
    """All assignments, in the order they are written, cut into output files."""

    assignments: tuple[Assignment, ...]
    max_file_nbytes: int | None = None  # --split-max-size
    header_nbytes: int = 0  # of the first file, which carries the metadata, at most
    alignment: int = DEFAULT_ALIGNMENT
    files: tuple[tuple[Assignment, ...], ...] = field(init=False)

    def __post_init__(self):
        files = _split(self)
        object.__setattr__(self, "files", files)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, padding not counted."""
        return sum(a.nbytes for a in self.assignments)

    @property
    def n_weights(self) -> int:
        return sum(a.source.n_weights for a in self.assignments)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.n_weights

    def classes(self) -> list[TensorClass]:
        """The assignments folded over layers; kinds in order of first appearance."""
        folded: dict[tuple[str, ...], list[Assignment]] = {}
        kinds: dict[str, int] = {}
        for a in self.assignments:
            kind = _LAYER.sub("blk.*.", a.name)
            kinds.setdefault(kind, len(kinds))
            rule = a.rule if a.error is None else None
            folded.setdefault((kind, a.source.dtype, a.format.name, rule), []).append(a)
        return [
            TensorClass(
                *key[:3],
                rule=_range_of_errors(group) if key[3] is None else key[3],
                n_tensors=len(group),
                n_weights=sum(a.source.n_weights for a in group),
                nbytes=sum(a.nbytes for a in group),
                **({} if key[3] is not None else _of_all(group)),
            )
            for key, group in sorted(folded.items(), key=lambda item: kinds[item[0][0]])
        ]


def _range_of_errors(group: list[Assignment]) -> str:
    least, most = (f"{pick(a.error for a in group):.2g}" for pick in (min, max))
    return f"error {least}" if least == most else f"error {least} to {most}"


def _of_all(group: list[Assignment]) -> dict:
    """What a class says of tensors whose formats were chosen by their errors."""
    steps = [a.step for a in group]
    step = None
    if None not in steps and len({s.format for s in steps}) == 1:
        step = Step(steps[0].format, sum(s.nbytes for s in steps), sum(s.mends for s in steps))
    return {"layers": _layers(group), "damage": sum(a.damage for a in group), "step": step}


def _layers(group: list[Assignment]) -> tuple[int, ...]:
    return tuple(int(match[1]) for a in group if (match := _LAYER.search(a.name)))


TENSOR_ENTRY_NBYTES = 128
"""A tensor's entry in the header, at most."""

PART_NBYTES = 256
"""What a part of a split file holds besides tensors and their entries, at most: the split keys."""


def _split(plan: Plan) -> tuple[tuple[Assignment, ...], ...]:
    """Consecutive groups that fit the largest file; a larger tensor gets a file of its own."""
    files: list[list[Assignment]] = [[]]
    size = plan.header_nbytes
    for a in plan.assignments:
        nbytes = padded(a.nbytes, plan.alignment) + TENSOR_ENTRY_NBYTES
        limit = plan.max_file_nbytes
        if limit is not None and files[-1] and size + nbytes > limit:
            files.append([])
            size = PART_NBYTES
        files[-1].append(a)
        size += nbytes
    return tuple(map(tuple, files))
