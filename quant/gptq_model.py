"""Plans the folder of a GPTQ model: which linears become integers, and how many bytes that makes.

Every linear of the decoder's layers does; embeddings, norms, biases and the output matrix stay
16-bit. Sizes are arithmetic on headers; no weights are read.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

from quant import __version__
from quant.checkpoint import Checkpoint
from quant.display import printable
from quant.dynamic_4bit import find_quantizable, output_dtype
from quant.errors import BadInput
from quant.formats.gptq import WHOLE_ROW, Gptq
from quant.groups import Group, find_experts

VLLM_GROUP_SIZES = (WHOLE_ROW, 32, 64, 128)
"""# ref: vllm/model_executor/layers/quantization/utils/marlin_utils.py"""


@dataclass(frozen=True)
class GptqPlan:
    """Everything that will be written, decided."""

    checkpoint: Checkpoint
    format: Gptq
    damp: float
    static_groups: bool
    dtype: str  # "bfloat16" or "float16": of what stays
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def quantized(self) -> tuple[str, ...]:
        """Full dotted names of linears, in the order in which they are quantized."""
        return tuple(name for group in self.groups for name in group.modules)

    @cached_property
    def plain(self) -> tuple[str, ...]:
        """Names of the tensors that stay 16-bit, in the order of the checkpoint."""
        quantized = {f"{name}.weight" for name in self.quantized}
        return tuple(name for name in self.checkpoint.tensors if name not in quantized)

    def shape(self, module: str) -> tuple[int, int]:
        """(rows, columns) of a linear's weight."""
        return self.checkpoint.tensors[f"{module}.weight"].shape

    @property
    def widest(self) -> int:
        """The most columns that any linear has."""
        return max(self.shape(name)[1] for name in self.quantized)

    @property
    def quantized_nbytes(self) -> int:
        return sum(self.format.nbytes(self.shape(name)) for name in self.quantized)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        tensors = self.checkpoint.tensors
        return self.quantized_nbytes + sum(2 * prod(tensors[name].shape) for name in self.plain)

    @property
    def bits_per_weight(self) -> float:
        """Of the decoder's linears."""
        n_weights = sum(prod(self.shape(name)) for name in self.quantized)
        return 8 * self.quantized_nbytes / n_weights

    @property
    def quantization_config(self) -> dict:
        """What AutoGPTQ wrote, and transformers, GPTQModel and vLLM read."""
        return {
            "bits": self.format.bits,
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
        }


def plan_gptq(checkpoint: Checkpoint, format: Gptq, damp: float, static_groups: bool) -> GptqPlan:
    """What becomes of every tensor. Raises BadInput for a model that cannot be written so."""
    groups, _ = find_quantizable(checkpoint)
    if experts := find_experts(checkpoint.tensors.values()):
        raise BadInput(
            f"{printable(checkpoint.name)} is a mixture of experts, with {printable(experts[0])}.",
            "transformers keeps experts in one parameter, for which GPTQ has no format.",
            "Write it with `qwq-quant to-gguf` or `qwq-quant dynamic-4bit`.",
        )
    plan = GptqPlan(
        checkpoint, format, damp, static_groups, output_dtype(checkpoint), groups, _notes(format)
    )
    for name in plan.quantized:
        if why := format.misfit(plan.shape(name)):
            raise BadInput(
                f"{printable(name)} cannot be stored in GPTQ's format: {why}.",
                "All linears of a model share one group size.",
                _other_group_size(plan),
            )
    return plan


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
