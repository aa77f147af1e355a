"""What error feedback buys: divergence from the BF16 model, against plain rounding in equal bytes.

    python scripts/measure_gptq.py [--only budget]

examples/tiny-qwq's linears as GPTQ integers (4 and 8 bits, groups of 32, 64 and 128) and as NF4,
each rounded to the nearest, and with feedback calibrated on the built-in text; and both with a
budget for more bits, chosen by `gradient` on 8192 tokens. The divergence is measured on the
built-in held-out text, in windows of 256 tokens, whose second halves are scored.
Results go to benchmarks/gptq.csv; with --only, other rows stay there as they are.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from results import BENCHMARKS, ROOT, circumstances, write_results

from quant.algorithms.gptq import DAMP, gptq
from quant.budget import Budget
from quant.calibration.feedback import quantize_streamed
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens, cut_tokens
from quant.calibration.weights import ChangedWeights, CheckpointWeights
from quant.check_weights import Candidate, check_weights
from quant.checkpoint import Checkpoint
from quant.dynamic_4bit import plan_4bit
from quant.feedback_4bit import encode_with_feedback
from quant.formats.gptq import Gptq
from quant.formats.nf4 import Bnb4bit
from quant.gptq_model import GptqPlan, plan_gptq, spend_budget
from quant.gptq_rounding import make_grid, plainly_rounded
from quant.groups import Group, find_groups
from quant.measuring.levels import measure_levels
from quant.measuring.measure import measure
from quant.texts import built_in_texts, held_out_texts

SEQ_LEN = 256
MEASURED_TOKENS = 8192
DTYPE = "bfloat16"

Quantize = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


def integers(format: Gptq, method: str) -> Quantize:
    def quantize(name: str, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        if method == "nearest":
            return plainly_rounded(format, W)
        return gptq(
            W, H, make_grid(format, W), static_groups=method == "feedback, static groups"
        ).W_hat

    return quantize


def nf4(format: Bnb4bit, method: str) -> Quantize:
    def quantize(name: str, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        if method == "feedback":
            return encode_with_feedback(format, W, H, DTYPE)[1].W_hat
        importance = H.diagonal().numpy() if "importance" in method else None
        return torch.from_numpy(format.decode(format.encode(W.numpy(), DTYPE, importance), W.shape))

    return quantize


@dataclass(frozen=True)
class Case:
    """One way to store the model, and to come by it."""

    format: str
    method: str
    groups: tuple[Group, ...]  # that are quantized
    nbytes: int  # of all linears of the decoder
    quantize: Quantize


def of_all(checkpoint: Checkpoint, name: str, method: str, format, quantize: Quantize) -> Case:
    """All linears in one format."""
    groups = tuple(find_groups(checkpoint.tensors.values()))
    shapes = [checkpoint.tensors[f"{m}.weight"].shape for g in groups for m in g.modules]
    return Case(name, method, groups, sum(map(format.nbytes, shapes)), quantize)


def cases(checkpoint: Checkpoint) -> Iterator[Case]:
    kinds = [(bits, size, True) for bits in (4, 8) for size in (32, 64, 128)]
    kinds += [(bits, 128, False) for bits in (4, 8)]
    for bits, size, symmetric in kinds:
        format = Gptq(bits, size, symmetric)
        name = f"int{bits} {'sym' if symmetric else 'asym'} g{size}"
        for method in ("nearest", "feedback, static groups", "feedback, moving groups"):
            yield of_all(checkpoint, name, method, format, integers(format, method))
    for search in (False, True):
        format = Bnb4bit(search_scales=search)
        methods = ("nearest", "nearest, by importance", "feedback")
        for method in methods if search else (methods[0], methods[2]):
            name = "nf4, scales searched" if search else "nf4"
            yield of_all(checkpoint, name, method, format, nf4(format, method))


def budget_cases(checkpoint: Checkpoint) -> Iterator[Case]:
    """More bits for some groups, as `dynamic-4bit --budget` and `gptq --budget` buy them."""
    model = StreamedModel(checkpoint)
    tokens = cut_tokens(checkpoint, built_in_texts(), MEASURED_TOKENS, SEQ_LEN)
    format = Bnb4bit(search_scales=True)
    sensitivity = measure(model, tokens, format, DTYPE, frozenset({"gradient"}))
    plan = plan_4bit(checkpoint, format, Budget("share", 0.1), sensitivity)
    nbytes = sum(plan.group_nbytes(g, is_4bit=g.name not in plan.kept) for g in plan.groups)
    for method in ("nearest", "feedback"):
        name = "nf4, scales searched, budget 10 %"
        yield Case(name, method, plan.quantized_groups, nbytes, nf4(format, method))
    damage = None
    for share in (0.1, 0.2):
        plan = plan_gptq(checkpoint, Gptq(), DAMP, True, Budget("share", share))
        damage = damage or measure_levels(plan, model, tokens.ids)
        plan = spend_budget(plan, damage)
        nbytes = sum(plan.group_nbytes(group, plan.bits_of(group)) for group in plan.groups)
        for method in ("nearest", "feedback, static groups"):
            name = f"int4 sym g128, budget {100 * share:.0f} %"
            yield Case(name, method, plan.quantized_groups, nbytes, mixed(plan, method))


def mixed(plan: GptqPlan, method: str) -> Quantize:
    def quantize(name: str, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        return integers(plan.format_of(name), method)(name, W, H)

    return quantize


def quantized(checkpoint: Checkpoint, case: Case, tokens: Tokens) -> dict:
    """Module -> its decoded copy."""
    w_hat = {}

    def keep(name: str, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        w_hat[f"{name}.weight"] = case.quantize(name, W, H).contiguous()
        return w_hat[f"{name}.weight"]

    quantize_streamed(StreamedModel(checkpoint), case.groups, tokens.ids, keep)
    return w_hat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-qwq")
    parser.add_argument("--tokens", type=int, default=16384, help="of the calibration text")
    parser.add_argument("--fewer", type=int, nargs="*", default=[512, 1024, 4096])
    parser.add_argument("--only", help="cases whose format has this in its name")
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    held_out = cut_tokens(checkpoint, held_out_texts(), 8192, SEQ_LEN)
    about = {
        "positions": held_out.ids.shape[0] * (SEQ_LEN - SEQ_LEN // 2 - 1),
        **circumstances("torch", "transformers"),
    }
    rows: list[dict] = []

    def measure_case(n_tokens: int, case: Case) -> None:
        tokens = cut_tokens(checkpoint, built_in_texts(), n_tokens, SEQ_LEN)
        w_hat = quantized(checkpoint, case, tokens)
        weights = ChangedWeights(
            CheckpointWeights(checkpoint), frozenset(w_hat), lambda name, _: w_hat[name]
        )
        candidate = Candidate("", case.nbytes, weights)
        _, result = check_weights(checkpoint, [candidate], held_out, "cpu")
        n_weights = sum(
            prod(checkpoint.tensors[f"{module}.weight"].shape)
            for group in find_groups(checkpoint.tensors.values())
            for module in group.modules
        )
        plain = next((r for r in rows if r["format"] == case.format), None)
        rows.append(
            {
                "format": case.format,
                "method": case.method,
                "calibration_tokens": "" if case.method == "nearest" else tokens.n_tokens,
                "nbytes_of_linears": case.nbytes,
                "bits_per_weight": f"{8 * case.nbytes / n_weights:.4f}",
                "kld": f"{result.kld:.7f}",
                "kld_error": f"{result.kld_error:.7f}",
                "of_nearest": f"{result.kld / float(plain['kld']):.3f}" if plain else "1",
                "same_top": f"{result.same_top:.4f}",
                "perplexity": f"{result.perplexity:.3f}",
                **about,
            }
        )
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)

    for case in cases(checkpoint):
        if not args.only or args.only in case.format:
            measure_case(args.tokens, case)
    format, method = Gptq(4, 64), "feedback, static groups"
    if not args.only:
        for n_tokens in args.fewer:
            case = of_all(checkpoint, "int4 sym g64", method, format, integers(format, method))
            measure_case(n_tokens, case)
    if not args.only or args.only in "budget":
        for case in budget_cases(checkpoint):
            measure_case(args.tokens, case)

    def is_replaced(older: dict) -> bool:
        return not args.only or args.only in older["format"]

    write_results(BENCHMARKS / "gptq.csv", rows, is_replaced)


if __name__ == "__main__":
    main()
