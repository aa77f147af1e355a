"""Decides which linears of a model become 4-bit, and plans the folder that holds them.

    budget  ->  which groups keep 16 bits, so that the predicted damage is least  ->  every tensor

Sizes are arithmetic on headers; what was measured comes as a Sensitivity. Nothing is written here,
and no weights are read.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import prod

from quant.architectures import find_architecture
from quant.budget import Budget, Levels
from quant.checkpoint import Checkpoint
from quant.display import printable
from quant.errors import BadInput
from quant.formats.nf4 import Bnb4bit
from quant.groups import Group, find_experts, find_groups, find_linears
from quant.report.choice import Choice
from quant.selection import Solution
from quant.sensitivity import Sensitivity, check_model
from quant.skip_list import check_skip_list, make_skip_list
from quant.tensors import TensorInfo

DEFAULT_BUDGET = Budget("share", 0.10)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source, and whether its linear becomes 4-bit."""

    name: str
    shape: tuple[int, ...]
    is_4bit: bool


@dataclass(frozen=True)
class Plan4bit:
    """Everything that will be written, decided."""

    checkpoint: Checkpoint
    format: Bnb4bit
    dtype: str  # "bfloat16" or "float16": of what stays, and of what 4 bits are decoded to
    groups: tuple[Group, ...]
    kept: frozenset[str]  # names of groups
    budget: Budget
    feedback: bool = False  # errors of a 4-bit weight are made good by those after it
    choice: Choice | None = None  # None: nothing had to be chosen
    solution: Solution | None = None
    sensitivity: Sensitivity | None = None
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """In the order of the checkpoint."""
        quantized = {
            f"{m}.weight" for g in self.groups if g.name not in self.kept for m in g.modules
        }
        return tuple(
            PlannedTensor(name, info.shape, name in quantized)
            for name, info in self.checkpoint.tensors.items()
        )

    @property
    def format_name(self) -> str:
        """ "NF4", or "NF4 with error feedback"."""
        return self.format.quant_type.upper() + (" with error feedback" if self.feedback else "")

    @property
    def quantized_groups(self) -> tuple[Group, ...]:
        """Those that become 4-bit, in the order in which the model computes them."""
        return tuple(group for group in self.groups if group.name not in self.kept)

    @property
    def stays(self) -> tuple[str, ...]:
        """Names of the tensors that are 16-bit, in the order of the checkpoint."""
        return tuple(t.name for t in self.tensors if not t.is_4bit)

    @property
    def widest(self) -> int:
        """The most columns that any 4-bit linear has."""
        return max((t.shape[1] for t in self.tensors if t.is_4bit), default=0)

    def parts(self, module: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """The tensors that a 4-bit linear's weight becomes: (name, dtype, shape); of JSON, at most
        so long."""
        name = f"{module}.weight"
        found = self.format.parts(self.checkpoint.tensors[name].shape).items()
        return [(part_name(name, suffix), *part) for suffix, part in found]

    @property
    def nbytes(self) -> int:
        """Of all tensors; each 4-bit one may take up to 20 bytes less."""
        return sum(
            self.format.nbytes(t.shape) if t.is_4bit else 2 * prod(t.shape) for t in self.tensors
        )

    @property
    def n_weights(self) -> int:
        return sum(prod(t.shape) for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the decoder's linears: all that could be 4-bit."""
        n_weights = sum(self.group_nbytes(g, is_4bit=False) for g in self.groups) // 2
        return 8 * self._groups_nbytes / n_weights

    @property
    def _groups_nbytes(self) -> int:
        return sum(self.group_nbytes(g, is_4bit=g.name not in self.kept) for g in self.groups)

    @cached_property
    def extra_nbytes(self) -> dict[str, int]:
        """What keeping each group in 16 bits costs over 4 bits."""
        sizes = zip(self.groups, self.group_sizes, strict=True)
        return {group.name: sixteen - four for group, (four, sixteen) in sizes}

    @cached_property
    def group_sizes(self) -> list[tuple[int, int]]:
        """Bytes of each group in 4 and in 16 bits."""
        return [
            (self.group_nbytes(g, is_4bit=True), self.group_nbytes(g, is_4bit=False))
            for g in self.groups
        ]

    @property
    def levels(self) -> Levels:
        """What a budget can be spent on."""
        tensors = self.checkpoint.tensors
        experts = sum(2 * tensors[name].n_weights for name in find_experts(tensors.values()))
        rest = self.nbytes - self._groups_nbytes
        return Levels(self.groups, self.group_sizes, rest, experts)

    def group_nbytes(self, group: Group, *, is_4bit: bool) -> int:
        shapes = [self.checkpoint.tensors[f"{name}.weight"].shape for name in group.modules]
        return sum(self.format.nbytes(shape) if is_4bit else 2 * prod(shape) for shape in shapes)

    @cached_property
    def skip_list(self) -> list[str]:
        """llm_int8_skip_modules: checked to mean the same to all its readers."""
        linears = find_linears(self.checkpoint.tensors.values())
        quantized = {t.name.removesuffix(".weight") for t in self.tensors if t.is_4bit}
        kept = [name for name in linears if name not in quantized]
        entries = make_skip_list(linears, kept)
        check_skip_list(entries, linears, kept)
        return entries


def part_name(tensor: str, suffix: str) -> str:
    """What a part of a 4-bit tensor is called; its codes have the tensor's own name."""
    return f"{tensor}.{suffix}" if suffix else tensor


def plan_plain(checkpoint: Checkpoint, format: Bnb4bit, budget: Budget) -> Plan4bit:
    """Everything that can be 4-bit is; `budget` is held against it, but not spent yet.

    What this refuses is known before hours of measuring. Raises BadInput for a model that cannot
    be quantized so, BadRecipe for a budget that buys nothing.
    """
    groups, notes = find_quantizable(checkpoint)
    dtype = output_dtype(checkpoint)
    plain = Plan4bit(checkpoint, format, dtype, groups, frozenset(), budget, notes=notes)
    if budget.needs_choice:
        plain.levels.spendable(budget)
    return plain


def plan_4bit(
    checkpoint: Checkpoint,
    format: Bnb4bit,
    budget: Budget = DEFAULT_BUDGET,
    sensitivity: Sensitivity | None = None,
    metric: str = "gradient",
) -> Plan4bit:
    """Which groups keep 16 bits within `budget`, and what that makes of every tensor.

    sensitivity: needed unless the budget is nothing or all.
    Raises BadInput for a model that cannot be quantized so or the sensitivities of another one,
    BadRecipe for a budget that buys nothing.
    """
    plain = plan_plain(checkpoint, format, budget)
    groups = plain.groups
    if budget.is_plain:
        return plain
    if budget.unit == "all":
        return replace(plain, kept=frozenset(g.name for g in groups))
    notes = (
        *plain.notes,
        *check_model(sensitivity, checkpoint),
        *_format_note(sensitivity, format),
    )
    values = sensitivity.values(metric)
    damage = [[values[g.name], 0.0] for g in groups]
    choice, solution = plain.levels.choose(metric, damage, budget)
    return replace(
        plain,
        kept=frozenset(choice.kept),
        choice=choice,
        solution=solution,
        sensitivity=sensitivity,
        notes=notes,
    )


def find_quantizable(checkpoint: Checkpoint) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """The groups that can be 4-bit, and what is to be said about the rest.

    Raises BadInput for an architecture we do not know, or one without any.
    """
    find_architecture(checkpoint.config)
    tensors = list(checkpoint.tensors.values())
    groups = find_groups(tensors)
    if not groups:
        raise BadInput(
            f"{printable(checkpoint.name)} has no linear layers that could be quantized.",
            "The decoder's q, k, v, o, gate, up and down projections are looked for.",
        )
    notes = []
    if experts := find_experts(tensors):
        share = sum(checkpoint.tensors[name].n_weights for name in experts)
        share /= sum(info.n_weights for info in tensors)
        notes.append(
            f"this is a mixture of experts: its experts, {100 * share:.0f} % of the weights, stay "
            "16-bit, since transformers cannot load them in 4 bits yet; vLLM makes its own NF4 of "
            "them while it loads"
        )
    odd = [n for g in groups for n in g.modules if _is_misread(checkpoint.tensors[f"{n}.weight"])]
    if odd:
        notes.append(
            f"{len(odd)} linears, such as {printable(odd[0])}, have rows that end within a block "
            "of 64 weights. bitsandbytes 0.50 fails on them on processors with AVX-512, or decodes "
            "them wrongly (ten times the error); on GPUs, and in the file, they are right"
        )
    return tuple(groups), tuple(notes)


def _is_misread(info: TensorInfo) -> bool:
    """Whether bitsandbytes' AVX-512 code takes the wrong scales for this weight."""
    return info.n_columns % 16 == 0 and info.n_columns % 64 != 0


def output_dtype(checkpoint: Checkpoint) -> str:
    """The 16-bit type of the folder: the config's own, else bfloat16. vLLM takes no other."""
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return "float16" if stated == "float16" else "bfloat16"


def _format_note(sensitivity: Sensitivity, format: Bnb4bit) -> list[str]:
    """What to say if another 4-bit format was measured than will be written."""
    measured, here = sensitivity.quantization, asdict(format)
    differing = [
        f"{key} {measured[key]}, not {here[key]}" for key in here if measured[key] != here[key]
    ]
    if not differing:
        return []
    return [f"the sensitivities were measured with {printable(', '.join(differing))}"]
