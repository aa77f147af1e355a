"""What `measure` and `dynamic-4bit` share: running the measurements with a progress bar."""

from collections.abc import Collection
from pathlib import Path

from quant.display import printable
from quant.errors import BadInput

LEAST_TOKENS = 256
"""One sequence of the default length; fewer say nothing about a layer of a thousand inputs."""


def run_measurement(
    checkpoint,
    format,
    metrics: Collection[str],
    calibration: Path | None,
    n_tokens: int,
    seq_len: int,
    device: str,
):
    """A Sensitivity of `checkpoint`; `weight` is always among the metrics."""
    from quant.calibration.device import choose_device
    from quant.calibration.streamed_model import StreamedModel
    from quant.cli.calibrating import calibration_tokens
    from quant.cli.progress import Progress
    from quant.dynamic_4bit import find_quantizable, output_dtype
    from quant.measuring.measure import measure, n_steps

    find_quantizable(checkpoint)
    metrics = frozenset(metrics)
    tokens = None
    if metrics - {"weight"}:
        tokens = calibration_tokens(checkpoint, calibration, n_tokens, seq_len)
        check_enough(tokens)
    model = StreamedModel(checkpoint, device=choose_device(device))
    with Progress("Measuring, layers", n_steps(model, tokens, metrics)) as bar:
        return measure(model, tokens, format, output_dtype(checkpoint), metrics, bar.advance)


def check_enough(tokens) -> None:
    """Raise BadInput where there are too few tokens for numbers that mean anything."""
    if tokens.n_tokens < LEAST_TOKENS:
        raise BadInput(
            f"{printable(tokens.text_name)} gives only {tokens.n_tokens} tokens to measure with.",
            f"At least {LEAST_TOKENS} are needed, and some thousands for numbers to rely on.",
            "Give a longer text with --calibration, or larger --tokens.",
        )


def prepared_check(checkpoint, device: str):
    """A check of what will be written: (plan, folder) -> results on the built-in held-out text.

    What can go wrong before that, goes wrong now.
    """
    from quant.calibration.device import choose_device
    from quant.check_4bit import N_MODELS, check_4bit
    from quant.cli.calibrating import held_out_tokens
    from quant.cli.progress import Progress

    device = choose_device(device)
    tokens = held_out_tokens(checkpoint)

    def run(plan, folder: Path):
        n_layers = max(group.layer for group in plan.groups) + 1
        with Progress("Checking, layers", N_MODELS * n_layers) as bar:
            return check_4bit(plan, folder, tokens, device, bar.advance)

    return run
