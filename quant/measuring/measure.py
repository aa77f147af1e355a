"""All measurements of one model, as a Sensitivity."""

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict

import torch

from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens
from quant.checkpoint import Checkpoint
from quant.convert import worker_count
from quant.display import printable
from quant.errors import BadInput
from quant.formats.nf4 import Bnb4bit
from quant.groups import Group, find_groups
from quant.manifest import package_versions
from quant.measuring.gradient import SEED, measure_gradient
from quant.measuring.kld import measure_kld, n_sweeps
from quant.measuring.local_errors import LocalErrors, Ratio, Rounding, measure_local_errors
from quant.sensitivity import (
    LARGEST,
    METRICS,
    MeasuredModule,
    Sensitivity,
    fingerprint,
    sample_weights,
)
from quant.tensors import STORED_DTYPES, to_float32


def n_steps(model: StreamedModel, tokens: Tokens | None, metrics: frozenset[str]) -> int:
    """How often `measure` calls progress(1): once a layer and pass."""
    passes = 1 + 2 * ("gradient" in metrics)
    if "kld" in metrics:
        passes += n_sweeps(model, find_groups(model.checkpoint.tensors.values()), tokens.ids)
    return passes * model.n_layers


def n_units(model: StreamedModel, tokens: Tokens | None, metrics: frozenset[str]) -> int:
    """How many steps its passes have: heads and comparisons, too."""
    n_more = "gradient" in metrics
    if "kld" in metrics:
        n_more += 1 + n_sweeps(model, find_groups(model.checkpoint.tensors.values()), tokens.ids)
    return n_steps(model, tokens, metrics) + n_more


def measure(
    model: StreamedModel,
    tokens: Tokens | None,
    format: Bnb4bit,
    dtype: str,
    metrics: frozenset[str],
    progress: Callable[[int], None] = lambda n: None,
    passes: Passes = UNKEPT,
) -> Sensitivity:
    """Every group of `model` by `metrics` (of METRICS), when it is stored in `format`.

    tokens: may be None if only `weight`, which is always measured, is asked for.
    dtype: "bfloat16" or "float16", what the weights are before they are quantized and after.
    Raises BadInput for NaN weights or outputs.
    """
    groups = find_groups(model.checkpoint.tensors.values())
    ids = tokens.ids if metrics - {"weight"} else None
    with ThreadPoolExecutor(worker_count()) as pool:
        rounding = rounding_of(format, dtype, pool)
        local = measure_local_errors(
            model, groups, ids, rounding, "block" in metrics, progress, passes
        )
        found = _of_groups(local, groups)
        for metric, run in (("gradient", measure_gradient), ("kld", measure_kld)):
            if metric in metrics:
                found[metric] = run(model, groups, ids, rounding, progress, passes)
    require_finite(found, model.checkpoint)
    tensors = model.checkpoint.tensors
    return Sensitivity(
        model=model_facts(model.checkpoint),
        calibration={} if ids is None else calibration_facts(tokens),
        quantization=asdict(format),
        versions=package_versions(),
        modules={
            name: MeasuredModule(tensors[f"{name}.weight"].shape, _of_module(local, name))
            for group in groups
            for name in group.modules
        },
        groups={group.name: group for group in groups},
        metrics={metric: found[metric] for metric in METRICS if metric in metrics | {"weight"}},
    )


def require_finite(found: dict[str, dict[str, float]], checkpoint: Checkpoint) -> None:
    """Raise BadInput for a model that gives NaN or infinity."""
    for metric, values in found.items():
        for name, value in values.items():
            if not value <= LARGEST:
                raise BadInput(
                    f"{printable(checkpoint.name)} cannot be measured: {metric} of "
                    f"{printable(name)} is {value:g}.",
                    "The model gives NaN or infinity somewhere: its weights are damaged, or they "
                    "overflow in the type it is computed in.",
                    "Download the checkpoint again, or ask its maker.",
                )


def model_facts(checkpoint: Checkpoint) -> dict[str, str | None]:
    return {
        "name": checkpoint.public_name,
        "revision": checkpoint.revision,
        "architecture": checkpoint.config["architectures"][0],
        "fingerprint": fingerprint(checkpoint),
        "sample": sample_weights(checkpoint),
    }


def calibration_facts(tokens: Tokens) -> dict[str, str | int]:
    return {
        "name": tokens.text_name,
        "sha256": tokens.text_sha256,
        "n_tokens": tokens.n_tokens,
        "seq_len": tokens.seq_len,
        "seed": SEED,
    }


def rounding_of(format: Bnb4bit, dtype: str, pool: Executor) -> Rounding:
    """What a weight is after it was stored in `format` and read again."""
    torch_dtype = getattr(torch, dtype)
    stored = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    bits = STORED_DTYPES[stored]

    def rounded(w: torch.Tensor) -> torch.Tensor:
        half = w.to(torch_dtype)
        if not torch.isfinite(half).all():
            raise OverflowError(f"a weight is beyond {dtype}")
        half = half.cpu().view(torch.int16).numpy()
        parts = format.encode_rows(
            lambda start, stop: to_float32(half[start:stop].view(bits), stored),
            half.shape,
            dtype,
            map=pool.map,
        )
        return torch.from_numpy(format.decode(parts, half.shape)).to(torch_dtype)

    return rounded


def _of_module(local: LocalErrors, name: str) -> dict[str, float]:
    seen = {"weight": local.weight, "activation": local.activation}
    return {metric: ratios[name].value for metric, ratios in seen.items() if ratios}


def _of_groups(local: LocalErrors, groups: list[Group]) -> dict[str, dict[str, float]]:
    """Of linears in a group, errors and signals are added up, then divided."""
    found = {}
    for metric, ratios in (("weight", local.weight), ("activation", local.activation)):
        if ratios:
            found[metric] = {
                g.name: Ratio.total([ratios[name] for name in g.modules]).value for g in groups
            }
    return {**found, "block": {name: ratio.value for name, ratio in local.block.items()}}
