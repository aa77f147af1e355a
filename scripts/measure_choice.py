"""What the choice of 16-bit layers is worth: divergence at equal bytes, by every way to choose.

    python scripts/measure_choice.py

Models: examples/tiny-qwq, and copies of it in which groups were made hard to quantize by an exact
rescaling of channels (tests/planted_models.py). For each, with plain NF4 and with searched scales:
every measure is taken on a calibration text, and a budget of 10 % over plain NF4 spent by it; the
same bytes are spent at random (20 times), from the first layer on, and from the last. In each order
a group is kept if it still fits. The divergence from the source is then measured on held-out text
(tests/texts/heldout.jsonl), and so is that of each group alone in 4 bits, which is what the
measures are correlated with (Spearman), and what "held-out kld" chooses by: the best that a measure
could do. `of_plain` is the divergence over that of plain NF4 as bitsandbytes rounds it.
Results go to benchmarks/choice.csv.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from results import BENCHMARKS, ROOT, circumstances, write_results

from quant.calibration.hidden_states import HiddenStates
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens, cut_tokens
from quant.calibration.weights import ChangedWeights, CheckpointWeights
from quant.checkpoint import Checkpoint
from quant.dynamic_4bit import Budget, Plan4bit, plan_4bit
from quant.evaluation.streamed import compare_streamed, final_states
from quant.formats.nf4 import Bnb4bit
from quant.measuring.kld import measure_kld
from quant.measuring.measure import measure, rounding_of
from quant.sensitivity import METRICS, Sensitivity
from quant.texts import Texts, built_in_texts, read_texts

sys.path.insert(0, str(ROOT / "tests"))

from planted_models import plant  # of tests/

MODEL = ROOT / "examples" / "tiny-qwq"
TEXTS = ROOT / "tests" / "texts"
BUDGET = Budget("share", 0.10)
SEQ_LEN = 256
SAME_KINDS, BUILT_IN = "same kinds as held-out", "built-in"

PLANTED = {  # name -> kind, layer, factor
    "down of layer 3 planted": [("down", 3, 32)],
    "o of layer 1 planted": [("o", 1, 32)],
    "qkv of layer 2 planted": [("qkv", 2, 32)],
    "four groups planted, weakly": [
        ("down", 3, 8), ("o", 1, 8), ("gate_up", 4, 8), ("qkv", 2, 8)
    ],
}  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """A model's divergence from itself, on held-out text, when some groups are rounded."""

    checkpoint: Checkpoint
    ids: np.ndarray
    reference: HiddenStates
    model: StreamedModel

    @classmethod
    def of(cls, checkpoint: Checkpoint, ids: np.ndarray) -> "HeldOut":
        model = StreamedModel(checkpoint)
        return cls(checkpoint, ids, final_states(model, ids), model)

    def divergence(self, rounded: dict[str, torch.Tensor]) -> float:
        """Mean nats a token with these weights instead of their own."""
        own = CheckpointWeights(self.checkpoint)
        weights = ChangedWeights(own, frozenset(rounded), lambda name, _: rounded[name])
        states = final_states(StreamedModel(self.checkpoint, weights), self.ids)
        (scores,) = compare_streamed(self.model, self.reference, [states], self.ids)
        return float(scores.kld.mean())


def spearman(a: dict[str, float], b: dict[str, float]) -> float:
    ranks = [np.argsort(np.argsort([values[name] for name in a])) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def fill(order: list[str], plain: Plan4bit) -> frozenset[str]:
    """Groups in this order, each if it still fits into the budget."""
    room, kept = BUDGET.value * plain.nbytes, set()
    for name in order:
        if plain.extra_nbytes[name] <= room:
            room -= plain.extra_nbytes[name]
            kept.add(name)
    return frozenset(kept)


def blind_choices(plain: Plan4bit, n_seeds: int) -> Iterator[tuple[str, frozenset[str]]]:
    names = [group.name for group in plain.groups]
    yield "first layers", fill(names, plain)
    yield "last layers", fill(names[::-1], plain)
    for seed in range(n_seeds):
        yield "random", fill(list(np.random.default_rng(seed).permutation(names)), plain)


def tokens_of(checkpoint: Checkpoint, texts: Texts, n_tokens: int) -> Tokens:
    return cut_tokens(checkpoint, texts, n_tokens, SEQ_LEN)


def with_metric(sensitivity: Sensitivity, values: dict[str, float]) -> Sensitivity:
    return replace(sensitivity, metrics={**sensitivity.metrics, "kld": values})


def rows_of(
    model_name: str,
    folder: Path,
    planted: list[str],
    texts: dict[str, Texts],
    search: bool,
    plain_kld: float | None,
    args,
) -> tuple[list[dict], float]:
    """All rows of one model with one way to round, and plain NF4's divergence."""
    checkpoint, format = Checkpoint.open(folder), Bnb4bit(search_scales=search)
    held_out = HeldOut.of(
        checkpoint, tokens_of(checkpoint, read_texts(TEXTS / "heldout.jsonl"), args.held_out).ids
    )
    plain = plan_4bit(checkpoint, format, Budget("share", 0.0))
    rows: list[dict] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rounding = rounding_of(format, plain.dtype, pool)
        own = CheckpointWeights(checkpoint)
        rounded = {t.name: rounding(own.read(t.name)) for t in plain.tensors if t.is_4bit}

        def divergence(kept: frozenset[str]) -> float:
            stays = {f"{m}.weight" for g in plain.groups if g.name in kept for m in g.modules}
            return held_out.divergence({n: w for n, w in rounded.items() if n not in stays})

        nothing = divergence(frozenset())
        plain_kld = plain_kld or nothing

        def add(choice: str, kept: frozenset[str], kld: float, text: str = "", **more) -> None:
            over = replace(plain, kept=kept).nbytes / plain.nbytes - 1
            row = {
                "model": model_name,
                "scales": "searched" if search else "bitsandbytes'",
                "choice": choice,
                "text": text,
                "over_plain": f"{100 * over:.1f} %",
                "kld": f"{kld:.5f}",
                "of_plain": f"{kld / plain_kld:.3f}",
                "rank_correlation": "",
                "planted_at_rank": "",
            } | more
            rows.append(row)
            print("  ".join(str(value) for value in row.values() if value), flush=True)

        add("nothing kept", frozenset(), nothing)
        groups = list(plain.groups)
        truth = measure_kld(held_out.model, groups, held_out.ids, rounding, lambda n: None)
        for text_name, text in texts.items():
            tokens = tokens_of(checkpoint, text, args.tokens)
            streamed = StreamedModel(checkpoint)
            found = measure(streamed, tokens, format, plain.dtype, frozenset(METRICS))
            columns = [(metric, metric, found) for metric in METRICS]
            if text_name == SAME_KINDS:
                columns.append(("held-out kld", "kld", with_metric(found, truth)))
            for name, metric, sensitivity in columns:
                kept = plan_4bit(checkpoint, format, BUDGET, sensitivity, metric).kept
                values = sensitivity.values(metric)
                order = sorted(values, key=values.__getitem__, reverse=True)
                more = {"rank_correlation": f"{spearman(values, truth):.2f}"}
                more["planted_at_rank"] = " ".join(str(order.index(p) + 1) for p in planted)
                add(name, kept, divergence(kept), text_name, **more)
        random = []
        for choice, kept in blind_choices(plain, args.seeds):
            kld = divergence(kept)
            if choice == "random":
                random.append((kld, kept))
            else:
                add(choice, kept, kld)
        add(f"random, mean of {args.seeds}", random[0][1], float(np.mean([k for k, _ in random])))
        best = min(random, key=lambda one: one[0])
        add(f"random, best of {args.seeds}", best[1], best[0])
    return rows, plain_kld


def models(folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Name, folder, and the groups that were planted."""
    yield "tiny-qwq", MODEL, []
    for name, groups in PLANTED.items():
        target, names = folder / name, []
        for kind, layer, factor in groups:
            names.append(plant(target if names else MODEL, target, kind, layer, factor))
        yield f"tiny-qwq, {name}", target, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="to measure on")
    parser.add_argument("--held-out", type=int, default=8192, help="tokens to judge on")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "choice.csv")
    args = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, folder, planted in models(Path(temporary)):
            texts = {SAME_KINDS: read_texts(TEXTS / "calibration.jsonl")}
            if not planted:
                texts[BUILT_IN] = built_in_texts()
            plain_kld = None
            for search in (False, True):
                more, plain_kld = rows_of(name, folder, planted, texts, search, plain_kld, args)
                rows += more
    about = {
        "tokens": args.tokens,
        "held_out_tokens": args.held_out,
        **circumstances("torch", "transformers", "qwq-quant"),
    }
    write_results(args.output, [row | about for row in rows])


if __name__ == "__main__":
    main()
