"""qwq-quant dynamic-4bit: a bitsandbytes folder whose sensitive layers stay 16-bit."""

import time
from dataclasses import replace
from pathlib import Path

import click

from quant.cli import options
from quant.cli.mending import lora_option, mend, mending_options

FOR_THE_FIGURES = {"weight", "activation"}
"""Measured besides the metric that chooses; they cost next to nothing."""


@click.command("dynamic-4bit")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write.",
)
@click.option(
    "--budget",
    type=options.BudgetType(),
    help="What keeping layers in 16 bits may cost: a share of plain 4-bit's size (10%), bytes "
    "(1.5GB), 0 for plain 4-bit, all for a 16-bit copy. [default: 10%]",
)
@click.option(
    "--target-bpw",
    type=options.BitsPerWeight(),
    help="Instead of --budget: bits per weight of the decoder's linear layers. Plain 4-bit has "
    "4.13 in large models.",
)
@click.option(
    "--metric",
    type=click.Choice(options.METRICS),
    default="gradient",
    show_default=True,
    help="What damage is measured by; see `qwq-quant measure --help`.",
)
@click.option(
    "--sensitivity",
    type=click.Path(path_type=Path),
    help="What `qwq-quant measure` wrote; without it, MODEL is measured now.",
)
@options.format_4bit_options
@click.option(
    "--gptq",
    is_flag=True,
    help="Error feedback: the weights after one that was rounded make good its error on the "
    "calibration text. Same format and size, closer outputs; slow without a GPU. --tokens must be "
    "at least the widest layer's inputs, better four times as many: 110000 for a 32B model.",
)
@options.calibration_options(seq_len=256, n_tokens=8192)
@mending_options
@lora_option
@click.option("--base-model", help="org/name of MODEL on the hub, for the model card.")
@click.option(
    "--check/--no-check",
    default=True,
    help="Measure at the end, on a built-in text, what was lost. [default: check]",
)
@options.dry_run
@options.force
@options.resume
@options.output_format
@options.model_options
@options.debug
def command(
    model, output, budget, target_bpw, metric, sensitivity, quant_type, double_quant,
    search_scales, gptq, calibration, n_tokens, seq_len, device, recipe, fix, base_model, check,
    dry_run, force, resume, output_format, **where,
):  # fmt: skip
    """Write MODEL in 4 bits (bitsandbytes), its sensitive layers in 16.

    Measures what 4 bits do to each layer, keeps those in 16 bits whose damage is worth most within
    the budget, and writes a folder that transformers, PEFT and vLLM load: weights, the list of
    exceptions in the one form that all of them read alike, figures, a model card. One decoder layer
    is in memory at a time. --dry-run measures too, and prints the table. After an interruption, in
    whichever of its stages, the same command goes on.

    \b
    Examples:
      qwq-quant dynamic-4bit examples/tiny-qwq -o tiny-qwq-4bit
      qwq-quant dynamic-4bit examples/tiny-qwq -o tiny-qwq-4bit --gptq
      qwq-quant dynamic-4bit examples/tiny-qwq -o plain --budget 0
      qwq-quant dynamic-4bit examples/tiny-qwq -o small --target-bpw 4.8 --dry-run
    """
    from quant.architectures import find_architecture
    from quant.cli.calibrating import held_out_tokens, planned_run
    from quant.cli.measuring import check_of
    from quant.cli.plan_4bit import print_plan, print_written
    from quant.cli.plan_table import print_note
    from quant.cli.resuming import resuming
    from quant.dynamic_4bit import plan_4bit, plan_plain
    from quant.folder_needs import folder_estimate, folder_nbytes, works_of_4bit
    from quant.formats.nf4 import Bnb4bit
    from quant.source import open_checkpoint
    from quant.write_4bit import fill_4bit, run_4bit

    budget = _budget(budget, target_bpw)
    gptq = gptq and budget.unit != "all"  # a 16-bit copy has no errors
    mended = mend(open_checkpoint(model, check_config=find_architecture, **where), recipe, fix)
    checkpoint = mended.source
    started = time.monotonic()
    format = Bnb4bit(quant_type, double_quant, search_scales=search_scales)

    def planned(measured=None):
        plan = plan_4bit(checkpoint, format, budget, measured, metric)
        return replace(plan, notes=(*mended.notes, *plan.notes, *few), feedback=gptq)

    plain = replace(plan_plain(checkpoint, format, budget), feedback=gptq)
    must_measure = budget.needs_choice and sensitivity is None
    metrics = {metric, *FOR_THE_FIGURES} if must_measure else ()
    layerwise = planned_run(
        checkpoint, works_of_4bit(plain, metrics, gptq, check), output, folder_nbytes(plain),
        calibration, n_tokens, seq_len, device, saves=resume != "never",
    )  # fmt: skip
    layerwise.needs().require()
    given = _read(sensitivity, calibration, gptq)
    tokens, few = _tokens(plain, must_measure, calibration, n_tokens, seq_len)
    plan = plain if must_measure else planned(given)
    held_out = held_out_tokens(checkpoint) if check and not dry_run else None
    if tokens is not None or held_out is not None:
        from quant.calibration.device import choose_device

        device = choose_device(device)

    def measured(passes=None):
        from quant.cli.measuring import run_measurement

        return run_measurement(checkpoint, format, metrics, tokens, device, passes)

    if dry_run:
        plan, needs = planned(measured()) if must_measure else plan, layerwise.needs()
        print_plan(plan, output_format, needs, folder_estimate(layerwise, plan))
        raise click.exceptions.Exit(needs.exit_code)
    with (
        resuming(resume, "step") as resume,
        run_4bit(
            plan,
            output,
            force,
            options.typed_command(),
            resume,
            tokens=tokens,
            device=device,
            metric=metric if must_measure else None,
            held_out=held_out,
        ) as run,
    ):
        if must_measure:
            from quant.sensitivity import Sensitivity

            found = run.measure(lambda passes: measured(passes).to_json())
            plan = planned(Sensitivity.from_json(found))
        for note in plan.notes:
            print_note(note, err=True)
        with _progress(plan) as bar:
            written = fill_4bit(
                plan,
                run,
                tokens=tokens,
                device=device,
                base_model=base_model or (checkpoint.name if checkpoint.revision else None),
                progress=bar.advance,
                check=check_of(held_out, device, run.passes) if check else None,
            )
    print_written(plan, written, time.monotonic() - started, output_format)


def _read(sensitivity: Path | None, calibration: Path | None, gptq: bool):
    """What --sensitivity says; None without it. Raises UsageError beside --calibration."""
    from quant.errors import UsageError
    from quant.sensitivity import read_sensitivity

    if sensitivity is None:
        return None
    if calibration is not None and not gptq:
        raise UsageError(
            "--calibration would not be used: --sensitivity says what was measured.",
            "",
            "Leave one of them out.",
        )
    return read_sensitivity(sensitivity)


def _tokens(plain, must_measure: bool, calibration: Path | None, n_tokens: int, seq_len: int):
    """What to measure and to feed errors back on, and notes on it; None if neither is to be done.

    Raises BadInput for too little.
    """
    if not (must_measure or plain.feedback):
        return None, ()
    from quant.cli.calibrating import calibration_tokens
    from quant.cli.measuring import check_enough

    tokens = calibration_tokens(plain.checkpoint, calibration, n_tokens, seq_len)
    if must_measure:
        check_enough(tokens)
    if not plain.feedback:
        return tokens, ()
    from quant.write_with_feedback import check_tokens, token_notes

    check_tokens(plain, tokens)
    return tokens, token_notes(plain, tokens)


def _progress(plan):
    """A bar of what write_4bit counts."""
    from quant.cli.progress import Progress

    if plan.feedback:
        return Progress("Quantizing, layers", plan.groups[-1].layer + 1)
    return Progress("Writing, weights", plan.n_weights)


def _budget(budget, target_bpw: float | None):
    """The one that was given. Raises UsageError for both."""
    from quant.dynamic_4bit import DEFAULT_BUDGET, Budget
    from quant.errors import UsageError

    if budget is not None and target_bpw is not None:
        raise UsageError(
            "--budget and --target-bpw say the same thing in two ways.", "", "Give one of them."
        )
    if target_bpw is not None:
        return Budget("bits_per_weight", target_bpw)
    return budget or DEFAULT_BUDGET
