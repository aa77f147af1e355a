"""Which format every tensor gets, so that a file of a given size does the least damage.

A named mixture spends its bits by the tensor's name. Here each tensor is encoded in every format of
a ladder, its error is measured, and what a byte more would mend decides:

    minimise  sum_t weight_t * error_t(format_t)    subject to    sum_t nbytes_t(format_t) <= budget

    error = sum_ij importance_j (w - w_hat)_ij^2 / sum_ij importance_j w_ij^2

`error` is the relative squared error of the layer's output for inputs of that importance (all 1
without an importance matrix). Formats have nearly the same error in all tensors, so the weight,
how much of the model one tensor's output is, decides most. The rows of a block's last linear are
added to the residual stream, so a block is worth the share of the stream that it writes:

    share = E|W x|^2 / E|h|^2,    E|W x|^2 = sum_ij importance_j w_ij^2,    h = h before + W x

The importance matrix says so for every block, and the shares differ tenfold: where an early
ffn_down writes a stream's "massive activations", it is all of it. Without one, a feed-forward
block's share is taken to be 1 / n_layers, attention's half as much, and twice that in the first and
last eighth of the layers, where llama.cpp's mixtures, too, spend more. What else was tried on
examples/tiny-qwq is in CHANGELOG.md, what came of it in benchmarks/target.csv.

Errors come from a sample of rows, so that a plan for 32 billion weights takes minutes.

# ref: the error's sum over layers: HIGGS, arXiv 2411.17525; massive activations: arXiv 2402.17762
"""

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import ceil, floor, sqrt

import numpy as np

from quant.assembly import Assembly
from quant.convert import worker_count
from quant.display import human_bytes
from quant.errors import BadRecipe
from quant.finite import zero_nonfinite
from quant.formats import FORMATS, Float16Overflow, Format
from quant.gguf_file import padded
from quant.measured_errors import MeasuredErrors
from quant.mixtures import NEEDS_IMPORTANCE
from quant.plan import Assignment, Plan, Step
from quant.selection import Solution, solve
from quant.tensors import TensorReader

Progress = Callable[[int, int], None]
"""Called with the tensors measured so far, and how many there are."""


# --- the wish ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """How large the file may be: bits per weight over all tensors, or bytes of the whole file."""

    bits_per_weight: float | None = None
    file_nbytes: int | None = None

    def __str__(self) -> str:
        if self.bits_per_weight is not None:
            return f"{self.bits_per_weight:.4g} bits per weight"
        return human_bytes(self.file_nbytes)

    def tensor_nbytes(self, plan: Plan, header_nbytes: int) -> int:
        """The bytes that all tensors of `plan` may take, padding included."""
        if self.bits_per_weight is not None:
            return floor(self.bits_per_weight * plan.n_weights / 8)
        return self.file_nbytes - header_nbytes

    def limit(
        self, tensor_nbytes: int, plan: Plan, header_nbytes: int, whole: Callable[[float], int]
    ) -> str:
        """So many bytes of tensors as the user would have to ask for them; `whole`: floor, ceil."""
        if self.bits_per_weight is not None:
            bits = 8 * tensor_nbytes / plan.n_weights
            return f"{whole(1000 * bits) / 1000:g} bits per weight"
        nbytes = tensor_nbytes + header_nbytes
        return f"{human_bytes(nbytes)} ({nbytes} bytes)"


# --- the ladder -------------------------------------------------------------------------------

LADDER = {
    256: (
        "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S",
        "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0",
    ),
    32: ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    1: (),
}  # fmt: skip
"""Formats to choose from, by what the rows' length is a multiple of. Where rows fill blocks of 256,
the formats of 32 are beaten by one of their size. 16 bits stand at the end of every ladder."""


def ladder(assignment: Assignment) -> list[Format]:
    """The formats that this tensor can have, smallest first; the last one is taken to be exact."""
    names = [
        name
        for name in LADDER[_block_of(assignment)]
        if assignment.importance is not None or name not in NEEDS_IMPORTANCE
    ]
    exact = "F16" if assignment.source.dtype == "F16" else "BF16"
    return [FORMATS[name] for name in (*names, exact)]


def _block_of(assignment: Assignment) -> int:
    """Which of the ladders: the widest blocks that its rows fill."""
    return next(n for n in LADDER if assignment.source.n_columns % n == 0)


# --- errors -----------------------------------------------------------------------------------

SAMPLE_WEIGHTS = 1 << 19
"""Weights of a tensor that are encoded to measure it: 102 rows of 5120, 0.2 seconds of one core if
there is an importance matrix. Errors are then 1 to 2 % off, while those of neighbours on the ladder
differ by tens of percent; the plan says how far off they may be."""

LEAST_ROWS = 64


@dataclass(frozen=True)
class Measured:
    """What a tensor's sampled rows say."""

    errors: dict[str, float]  # relative squared error of the output, by format
    row_energy: float  # sum_j importance_j w_ij^2, the mean over rows i
    standard_error: float  # of the errors, relative; 0 where all rows were measured


def measure(assignment: Assignment, formats: Iterable[Format], reader: TensorReader) -> Measured:
    """The tensor's error in every format, from rows that are always the same.

    A format that cannot hold the tensor (Float16Overflow) is left out. NaN and infinite weights
    count as zeros: what becomes of them is decided when they are written.
    """
    source = assignment.source
    n_matrices = 1 if assignment.importance is None else len(assignment.importance)
    energies: list[np.ndarray] = []  # (rows of one matrix,) each
    errors: dict[Format, list[np.ndarray]] = {format: [] for format in formats}
    for rows in _of_one_matrix(sample_rows(source), source.n_rows // n_matrices):
        w = _read_rows(assignment, reader, rows)  # (len(rows), n_columns)
        importance = assignment.importance_of(int(rows[0]))
        energies.append(_weighted_squares(w, importance))
        for format in list(errors):
            try:
                w_hat = format.decode(format.encode(w, importance), w.shape)
            except Float16Overflow:
                del errors[format]
                continue
            errors[format].append(_weighted_squares(w - w_hat, importance))
    energy = np.concatenate(energies)
    by_row = {format.name: np.concatenate(parts) for format, parts in errors.items()}
    return Measured(
        {name: _ratio(error, energy) for name, error in by_row.items()},
        # An expert that saw no token has importance 1, far from that of others: no mean of means.
        float(np.median([e.mean() for e in energies])),
        max((_standard_error(e, energy, source.n_rows) for e in by_row.values()), default=0.0),
    )


def sample_rows(source: Assembly) -> np.ndarray:
    """Numbers of the rows to measure, rising: one of every stratum, drawn with a fixed seed.

    Not every n-th: rows of a head differ by their place in it, and n could divide its length.
    """
    n = max(LEAST_ROWS, SAMPLE_WEIGHTS // source.n_columns)
    if n >= source.n_rows:
        return np.arange(source.n_rows)
    edges = np.arange(n + 1) * source.n_rows // n
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def _of_one_matrix(rows: np.ndarray, matrix_rows: int) -> list[np.ndarray]:
    """`rows` cut where another matrix of a stacked tensor begins."""
    return np.split(rows, np.flatnonzero(np.diff(rows // matrix_rows)) + 1)


def _read_rows(assignment: Assignment, reader: TensorReader, rows: np.ndarray) -> np.ndarray:
    """These rows as float32, without NaN and infinities. The order within heads is of no matter."""
    source = replace(assignment.source, rotary_rows=0)
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    w = np.concatenate([source.read_float32(reader, int(r[0]), int(r[-1]) + 1) for r in runs])
    zero_nonfinite(w, "F32")
    return w


def _weighted_squares(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """sum_j importance_j x_ij^2, float64 (rows,). No BLAS: its threads would fight with ours."""
    squares = x * x
    if importance is not None:
        squares *= importance
    return squares.sum(axis=1, dtype=np.float64)


def _ratio(error: np.ndarray, energy: np.ndarray) -> float:
    total = float(energy.sum())
    return float(error.sum()) / total if total else 0.0


def _standard_error(error: np.ndarray, energy: np.ndarray, n_rows: int) -> float:
    """Of _ratio(error, energy), relative, as an estimate of all `n_rows` rows' ratio."""
    n, total = len(error), float(error.sum())
    if n == n_rows or not total:
        return 0.0
    residual = error - _ratio(error, energy) * energy
    return sqrt(float(residual @ residual) * n / (n - 1) * (1 - n / n_rows)) / total


# --- what an error costs ----------------------------------------------------------------------

KIND_WEIGHT = {"attn_q": 0.5, "attn_k": 0.5, "ffn_up": 0.5}
"""What an error in the output of one linear does to its block's output, by kind; 1 for others.
Softmax takes the edge off errors of scores, SiLU gates those of ffn_up."""

OUTPUT_WEIGHT = 4.0
"""An error in the logits themselves, against one in the residual stream. Both as measured on
examples/tiny-qwq, rounded."""

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(attn|ffn)_(\w+)\.weight")


@dataclass(frozen=True)
class Place:
    """Where in the model a tensor stands."""

    layer: int
    kind: str  # "ffn_gate"
    writer: str  # of its block: the kind of the linear that writes the residual stream

    @classmethod
    def of(cls, name: str) -> "Place | None":
        """None for a tensor of no layer, or of none that is known."""
        match = _LAYER_TENSOR.fullmatch(name)
        if match is None:
            return None
        layer, block, part = match.groups()
        branch = next((s for s in ("_exps", "_shexp") if part.endswith(s)), "")
        writer = "attn_output" if block == "attn" else f"ffn_down{branch}"
        return cls(int(layer), f"{block}_{part.removesuffix(branch)}", writer)

    @property
    def is_writer(self) -> bool:
        return self.kind in ("attn_output", "ffn_down")


def damage_weights(
    assignments: Iterable[Assignment], measured: dict[str, Measured], n_experts_used: int = 1
) -> dict[str, float]:
    """How much one unit of each tensor's error matters: its block's share of the residual stream.

    measured: by name; of tensors that write the stream, whether or not their format is free.
    """
    assignments = list(assignments)
    places = {a.name: place for a in assignments if (place := Place.of(a.name))}
    shares = _usual_shares(places.values())
    shares |= _measured_shares(assignments, places, measured, n_experts_used)
    weights = {}
    for a in assignments:
        if place := places.get(a.name):
            weights[a.name] = KIND_WEIGHT.get(place.kind, 1.0) * shares[place.layer, place.writer]
        else:
            weights[a.name] = OUTPUT_WEIGHT if a.name == OUTPUT else 1.0
    if EMBEDDING in weights and OUTPUT not in weights:  # one tensor for both
        weights[EMBEDDING] += OUTPUT_WEIGHT
    return weights


Block = tuple[int, str]
"""Layer, and the kind of the linear that writes the residual stream."""


def _measured_shares(
    assignments: list[Assignment],
    places: dict[str, Place],
    measured: dict[str, Measured],
    n_experts_used: int,
) -> dict[Block, float]:
    """Every block's share of the residual stream; none if one of them has no importance."""
    written: dict[Block, float] = {}  # E|W x|^2
    for a in assignments:
        place = places.get(a.name)
        if place is None or not place.is_writer:
            continue
        if a.importance is None:
            return {}
        n_added = n_experts_used if place.writer.endswith("_exps") else 1
        energy = measured[a.name].row_energy * a.source.shape[-2]
        written[place.layer, place.writer] = energy / n_added
    stream = measured[EMBEDDING].row_energy if EMBEDDING in measured else 0.0
    shares = {}
    # Attention comes first in a layer; then all branches of the feed-forward block at once.
    for _, some in groupby(sorted(written), lambda block: (block[0], block[1] == "attn_output")):
        blocks = list(some)
        stream += sum(written[block] for block in blocks)
        shares |= {block: written[block] / stream if stream else 0.0 for block in blocks}
    return shares


def _usual_shares(places: Iterable[Place]) -> dict[Block, float]:
    """1 / n_layers, of attention half as much; twice that in the first and last eighth."""
    blocks = {(place.layer, place.writer) for place in places}
    n_layers = 1 + max((layer for layer, _ in blocks), default=0)
    edge = max(1, n_layers // 8)
    return {
        (layer, writer): (0.5 if writer == "attn_output" else 1)
        * (1 if edge <= layer < n_layers - edge else 2)
        / n_layers
        for layer, writer in blocks
    }


# --- choosing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """One format that a tensor may get."""

    format: Format
    nbytes: int  # with what is left empty behind it
    error: float


def choose_formats(
    plan: Plan,
    free: set[str],
    target: Target,
    *,
    header_nbytes: int = 0,
    n_experts_used: int = 1,
    encoder: Callable[[Format], Format] = lambda format: format,
    progress: Progress = lambda done, total: None,
    kept: MeasuredErrors | None = None,
) -> tuple[Plan, list[str]]:
    """`plan` with the best format for every tensor in `free`, and what to tell the user.

    header_nbytes: of the file, what is no tensor. encoder: gives a format another encoder
    (--refine). kept: where errors are kept for another run. Reads weights, on all cores.
    Raises BadRecipe, before that if it can, for a target that no choice of formats meets; what
    MeasuredErrors raises.
    """
    tensors = [a for a in plan.assignments if a.name in free]
    ladders = {a.name: [encoder(format) for format in ladder(a)] for a in tensors}
    fixed = sum(padded(a.nbytes, plan.alignment) for a in plan.assignments if a.name not in free)
    budget = target.tensor_nbytes(plan, header_nbytes)
    sizes = [[_nbytes(plan, a, format) for format in ladders[a.name]] for a in tensors]
    _check_choice(tensors)
    _check_reach(plan, target, header_nbytes, fixed, sizes, tensors)
    measured = _measure_all(plan.assignments, ladders, progress, kept)
    weights = damage_weights(plan.assignments, measured, n_experts_used)
    levels = [_levels(plan, a, ladders[a.name], measured[a.name]) for a in tensors]
    sizes = [[level.nbytes for level in some] for some in levels]
    # Again, for some formats may not be able to hold their tensor.
    _check_reach(plan, target, header_nbytes, fixed, sizes, tensors)
    damage = [
        [weights[a.name] * level.error for level in some]
        for a, some in zip(tensors, levels, strict=True)
    ]
    solution = solve(damage, sizes, budget - fixed)
    chosen = {
        a.name: _assign(a, some, some[i], target, weights[a.name])
        for a, some, i in zip(tensors, levels, solution.levels, strict=True)
    }
    assignments = tuple(chosen.get(a.name, a) for a in plan.assignments)
    notes = [_verdict(target, solution), *_sampling(measured)]
    return replace(plan, assignments=assignments), notes


def _nbytes(plan: Plan, assignment: Assignment, format: Format) -> int:
    return padded(format.nbytes(assignment.source.shape), plan.alignment)


def _check_choice(tensors: list[Assignment]) -> None:
    """Raise BadRecipe if there is none."""
    if not tensors:
        raise BadRecipe(
            "A target size has nothing to choose here.",
            "Every tensor has its format already: by --tensor-type, --output-type and "
            "--embedding-type, or because it is never quantized.",
            "Leave the target out, or name formats for fewer tensors.",
        )


def _check_reach(
    plan: Plan,
    target: Target,
    header_nbytes: int,
    fixed: int,
    sizes: list[list[int]],
    tensors: list[Assignment],
) -> None:
    """Raise BadRecipe unless the target lies between the smallest and the largest choice.

    sizes: of every format that each of `tensors` may get; fixed: bytes of all others.
    """
    budget = target.tensor_nbytes(plan, header_nbytes)
    least, most = (fixed + sum(map(pick, sizes)) for pick in (min, max))
    if budget < least:
        is_first = all(a.importance is None for a in plan.assignments)
        would_help = is_first and any(_block_of(a) == 256 for a in tensors)
        raise BadRecipe(
            f"A target of {target} is too small for this model.",
            "With every tensor in the smallest format it may have, it takes "
            f"{target.limit(least, plan, header_nbytes, ceil)}.",
            "Ask for that or more; --imatrix FILE allows smaller formats."
            if would_help
            else "Ask for that or more.",
        )
    if budget > most:
        raise BadRecipe(
            f"A target of {target} is more than this model takes: there is nothing to choose.",
            "With every tensor that is left to choose in 16 bits, it takes "
            f"{target.limit(most, plan, header_nbytes, floor)}.",
            "Ask for less, or for --type BF16.",
        )


def _measure_all(
    assignments: Iterable[Assignment],
    ladders: dict[str, list[Format]],
    progress: Progress,
    kept: MeasuredErrors | None,
) -> dict[str, Measured]:
    """Errors of the tensors that have a ladder, energies of those that the shares are made of."""
    wanted = [
        (a, ladders.get(a.name, [])[:-1])
        for a in assignments
        if a.name in ladders or _gives_energy(a)
    ]

    def rest(n_done: int) -> Iterator[dict]:
        with TensorReader() as reader, ThreadPoolExecutor(worker_count()) as pool:
            running = [pool.submit(measure, *each, reader) for each in wanted[n_done:]]
            try:
                yield from (asdict(future.result()) for future in running)
            finally:
                pool.shutdown(cancel_futures=True)

    found, measured = rest(0) if kept is None else kept.each(wanted, rest), {}
    with closing(found):
        for (a, _), unit in zip(wanted, found, strict=True):
            measured[a.name] = Measured(**unit)
            progress(len(measured), len(wanted))
    return measured


def _gives_energy(assignment: Assignment) -> bool:
    place = Place.of(assignment.name)
    return assignment.name == EMBEDDING or (place is not None and place.is_writer)


def _levels(
    plan: Plan, assignment: Assignment, formats: list[Format], measured: Measured
) -> list[Level]:
    """The formats that can hold the tensor, smallest first."""
    errors = {**measured.errors, formats[-1].name: 0.0}
    return [
        Level(format, _nbytes(plan, assignment, format), errors[format.name])
        for format in formats
        if format.name in errors
    ]


def _assign(
    assignment: Assignment, levels: list[Level], chosen: Level, target: Target, weight: float
) -> Assignment:
    """The assignment with its format, and why not a better one."""
    damage, step = weight * chosen.error, None
    rule = f"target {target}: error {chosen.error:.2g}, damage {damage:.2g}"
    better = [x for x in levels if x.nbytes > chosen.nbytes and x.error < chosen.error]
    if better:
        following = min(better, key=lambda x: x.nbytes)
        more = following.nbytes - chosen.nbytes
        step = Step(following.format.name, more, damage - weight * following.error)
        rule += f"; {step.format} costs {human_bytes(more)} more and mends {step.mends:.2g}"
    return replace(
        assignment,
        format=chosen.format,
        rule=rule,
        error=chosen.error,
        damage=damage,
        step=step,
    )


def _verdict(target: Target, solution: Solution) -> str:
    """How near the choice is to the best one."""
    found = f"Target {target}: estimated damage {solution.damage:.3g}"
    if solution.damage <= max(solution.bound, 0):
        return f"{found}, the least possible."
    proof = "the best choice" if solution.exact else "a good choice, not proven to be the best"
    over = solution.damage / solution.bound - 1 if solution.bound > 0 else 1.0
    above = f"{100 * over:.2g} % above" if over < 1 else f"{max(solution.bound, 0):.2g} is"
    return (
        f"{found}, {proof}; {above} the bound that could be met if formats could change within a "
        "tensor."
    )


def _sampling(measured: dict[str, Measured]) -> list[str]:
    sampled = [m.standard_error for m in measured.values() if m.standard_error]
    if not sampled:
        return []
    whose = "1 tensor" if len(sampled) == 1 else f"{len(sampled)} tensors"
    return [
        f"The errors of {whose} are estimates from a sample of rows, "
        f"{100 * max(sampled):.1g} % off at most (one standard error)."
    ]
