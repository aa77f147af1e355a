"""Plans the folder of a GPTQ model: which linears become integers, and how many bytes that makes.

Every linear of the decoder's layers does; embeddings, norms, biases and the output matrix stay
16-bit. A budget buys some groups of linears 8 or 16 bits, those for which it is worth most.
Sizes are arithmetic on headers; no weights are read.

KL divergence of examples/tiny-qwq on held-out text (benchmarks/gptq.csv), 4 bits in groups of 128:
0.0084; with 10 % more bytes 0.0039, with 20 % 0.0020.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from quant import __version__
from quant.budget import NOTHING, Budget, Levels
from quant.checkpoint import Checkpoint
from quant.display import printable
from quant.dynamic_4bit import find_quantizable, output_dtype
from quant.dynamic_rules import check_rules, exceptions
from quant.errors import BadInput
from quant.formats.gptq import WHOLE_ROW, Gptq
from quant.groups import Group, find_experts
from quant.report.choice import Choice
from quant.selection import Solution

VLLM_GROUP_SIZES = (WHOLE_ROW, 32, 64, 128)
"""# ref: vllm/model_executor/layers/quantization/utils/marlin_utils.py"""

METRIC = "gradient"
"""What a budget is spent by: the best of quant.sensitivity.METRICS for its price
(benchmarks/choice.csv), and dynamic-4bit's default."""


@dataclass(frozen=True)
class GptqPlan:
    """Everything that will be written, decided."""

    checkpoint: Checkpoint
    format: Gptq
    damp: float
    static_groups: bool
    dtype: str  # "bfloat16" or "float16": of what stays
    groups: tuple[Group, ...]
    budget: Budget = NOTHING
    bits: Mapping[str, int] = field(default_factory=dict)  # by group, where not the format's
    damage: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By group, for each of `ladder`, where it was measured."""
    choice: Choice | None = None  # None: nothing had to be chosen
    solution: Solution | None = None
    notes: tuple[str, ...] = ()

    # --- what becomes of each linear ---

    @property
    def ladder(self) -> tuple[int, ...]:
        """The bits that a group may have: the format's, and those that a budget can buy."""
        return (4, 8, 16) if self.format.bits == 4 else (8, 16)

    def bits_of(self, group: Group) -> int:
        return self.bits.get(group.name, self.format.bits)

    @cached_property
    def _bits_of_module(self) -> dict[str, int]:
        return {module: self.bits_of(group) for group in self.groups for module in group.modules}

    def format_with(self, bits: int) -> Gptq:
        """The format, but for its bits."""
        return replace(self.format, bits=bits)

    def format_of(self, module: str) -> Gptq:
        """Of a linear that is quantized."""
        return self.format_with(self._bits_of_module[module])

    @property
    def quantized_groups(self) -> tuple[Group, ...]:
        """In the order in which they are quantized."""
        return tuple(group for group in self.groups if self.bits_of(group) < 16)

    @cached_property
    def quantized(self) -> tuple[str, ...]:
        """Full dotted names of linears, in the order in which they are quantized."""
        return tuple(name for group in self.quantized_groups for name in group.modules)

    @cached_property
    def stays(self) -> tuple[str, ...]:
        """Names of the tensors that are 16-bit, in the order of the checkpoint."""
        quantized = {f"{name}.weight" for name in self.quantized}
        return tuple(name for name in self.checkpoint.tensors if name not in quantized)

    @property
    def fewest_bits(self) -> int:
        return min(self.bits_of(group) for group in self.groups)

    @property
    def is_mixed(self) -> bool:
        """Whether some linears have more bits than others."""
        return any(self.bits_of(group) != self.fewest_bits for group in self.groups)

    @property
    def mixes_integers(self) -> bool:
        """Whether some linears have 4 bits and others 8, which transformers does not load."""
        return len({self.bits_of(group) for group in self.quantized_groups}) > 1

    @property
    def name(self) -> str:
        """ "GPTQ 4-bit", "GPTQ, mixed bits"."""
        if not self.quantized:
            return "16-bit copy"
        return "GPTQ, mixed bits" if self.is_mixed else f"GPTQ {self.fewest_bits}-bit"

    # --- sizes ---

    def shape(self, module: str) -> tuple[int, int]:
        """(rows, columns) of a linear's weight."""
        return self.checkpoint.tensors[f"{module}.weight"].shape

    def parts(self, module: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """The tensors that a quantized weight becomes: (name, dtype, shape)."""
        found = self.format_of(module).parts(self.shape(module)).items()
        return [(f"{module}.{suffix}", *part) for suffix, part in found]

    @property
    def widest(self) -> int:
        """The most columns that any quantized linear has."""
        return max((self.shape(name)[1] for name in self.quantized), default=0)

    def group_nbytes(self, group: Group, bits: int) -> int:
        shapes = [self.shape(module) for module in group.modules]
        if bits == 16:
            return sum(2 * prod(shape) for shape in shapes)
        format = self.format_with(bits)
        return sum(format.nbytes(shape) for shape in shapes)

    @property
    def _groups_nbytes(self) -> int:
        return sum(self.group_nbytes(group, self.bits_of(group)) for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        grouped = {f"{module}.weight" for module in self._bits_of_module}
        tensors = self.checkpoint.tensors.values()
        rest = sum(2 * prod(info.shape) for info in tensors if info.name not in grouped)
        return rest + self._groups_nbytes

    @property
    def bits_per_weight(self) -> float:
        """Of the decoder's linears."""
        n_weights = sum(self.group_nbytes(group, 16) for group in self.groups) // 2
        return 8 * self._groups_nbytes / n_weights

    @cached_property
    def levels(self) -> Levels:
        """What a budget can be spent on."""
        sizes = [[self.group_nbytes(group, bits) for bits in self.ladder] for group in self.groups]
        return Levels(self.groups, sizes, self.nbytes - self._groups_nbytes)

    # --- what readers are told ---

    @cached_property
    def quantization_config(self) -> dict | None:
        """What AutoGPTQ wrote, and transformers, GPTQModel and vLLM read; None for a 16-bit copy.

        Checked to mean the same to all its readers.
        """
        if not self.quantized:
            return None
        bits = {group.name: self.bits_of(group) for group in self.groups}
        config = {
            "bits": self.fewest_bits,
            "checkpoint_format": self.format.checkpoint_format,
            "damp_percent": self.damp,
            "desc_act": False,  # vLLM takes no other
            "group_size": self.format.group_size,
            "lm_head": False,
            "meta": {"quantizer": [f"qwq-quant:{__version__}"]},
            "quant_method": "gptq",
            "static_groups": self.static_groups,
            "sym": self.format.symmetric,
            "true_sequential": True,
            **exceptions(self.groups, bits, self.fewest_bits),
        }
        check_rules(config, self.groups, self._bits_of_module)
        return config


def plan_gptq(
    checkpoint: Checkpoint,
    format: Gptq,
    damp: float,
    static_groups: bool,
    budget: Budget = NOTHING,
) -> GptqPlan:
    """What becomes of every tensor; a budget is held against the sizes, but not spent yet.

    Raises BadInput for a model that cannot be written so, BadRecipe for a budget that buys nothing.
    """
    groups, _ = find_quantizable(checkpoint)
    if experts := find_experts(checkpoint.tensors.values()):
        raise BadInput(
            f"{printable(checkpoint.name)} is a mixture of experts, with {printable(experts[0])}.",
            "transformers keeps experts in one parameter, for which GPTQ has no format.",
            "Write it with `qwq-quant to-gguf` or `qwq-quant dynamic-4bit`.",
        )
    dtype, notes = output_dtype(checkpoint), _notes(format)
    plan = GptqPlan(checkpoint, format, damp, static_groups, dtype, groups, budget, notes=notes)
    for name in plan.quantized:
        if why := format.misfit(plan.shape(name)):
            raise BadInput(
                f"{printable(name)} cannot be stored in GPTQ's format: {why}.",
                "All linears of a model share one group size.",
                _other_group_size(plan),
            )
    if budget.unit == "all":
        return replace(plan, bits={group.name: 16 for group in groups}, notes=())
    if budget.needs_choice:
        plan.levels.spendable(budget)
    return plan


def spend_budget(plan: GptqPlan, damage: Mapping[str, tuple[float, ...]]) -> GptqPlan:
    """The plan with its budget spent where it is worth most.

    damage: by group, for each of the plan's `ladder`. Raises BadRecipe.
    """
    values = [damage[group.name] for group in plan.groups]
    choice, solution = plan.levels.choose(METRIC, values, plan.budget)
    bits = {
        group.name: plan.ladder[level]
        for group, level in zip(plan.groups, solution.levels, strict=True)
        if level
    }
    chosen = replace(plan, bits=bits, damage=damage, choice=choice, solution=solution)
    if not chosen.mixes_integers:
        return chosen
    note = (
        "transformers does not load linears of 4 and of 8 bits in one model; vLLM and GPTQModel do"
    )
    return replace(chosen, notes=(*chosen.notes, note))


def _other_group_size(plan: GptqPlan) -> str:
    """What to type instead."""
    for size in (128, 64, 32, WHOLE_ROW):
        other = Gptq(plan.format.bits, size, plan.format.symmetric)
        if all(not other.misfit(plan.shape(name)) for name in plan.quantized):
            return f"Try --group-size {size}."
    return "Write it with `qwq-quant to-gguf` or `qwq-quant dynamic-4bit`."


def _notes(format: Gptq) -> tuple[str, ...]:
    if format.symmetric and format.group_size in VLLM_GROUP_SIZES:
        return ()
    what = "asymmetric weights" if not format.symmetric else f"groups of {format.group_size}"
    return (
        f"vLLM does not load {what}: it takes symmetric ones in groups of 32, 64 or 128 or whole "
        "rows (--group-size -1)",
    )
