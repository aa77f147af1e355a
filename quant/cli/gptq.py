"""qwq-quant gptq: Int4 and Int8 checkpoints for vLLM and transformers."""

import math
import time
from dataclasses import replace
from pathlib import Path

import click

from quant.cli import options
from quant.cli.mending import lora_option

MEASURED_TOKENS = 8192
"""Of the calibration text, at most, for measuring where a budget is worth most: dynamic-4bit's."""


class GroupSize(click.ParamType):
    """A number of weights, or -1 for whole rows."""

    name = "group size"

    def convert(self, value, param, ctx):
        try:
            size = int(value)
        except ValueError:
            size = 0
        if size < 1 and size != -1:
            self.fail("a number of weights is needed, or -1 for whole rows", param, ctx)
        return size


class Damp(click.FloatRange):
    """A share between 0 and 1; click alone lets NaN through."""

    def convert(self, value, param, ctx):
        share = super().convert(value, param, ctx)
        if math.isnan(share):
            self.fail("a number is needed", param, ctx)
        return share


@click.command("gptq")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write.",
)
@click.option(
    "--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Bits a weight."
)
@click.option(
    "--group-size",
    type=GroupSize(),
    default=128,
    show_default=True,
    help="Weights that share a scale; -1 for whole rows. vLLM takes 32, 64, 128 and -1.",
)
@click.option(
    "--sym/--asym",
    "symmetric",
    default=True,
    help="Levels on either side of zero alike, or from the least weight to the largest: closer, "
    "but vLLM does not take it. [default: sym]",
)
@click.option(
    "--static-groups/--no-static-groups",
    default=True,
    help="Choose all scales first, then round the weights with the largest inputs first; without "
    "it, from left to right, scales on the way. [default: static]",
)
@click.option(
    "--damp",
    type=Damp(min=0, max=1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="What is added to the inputs' mean square, as a share of it: less trust in the text.",
)
@click.option(
    "--budget",
    type=options.BudgetType(),
    help="Mixed precision: what more bits for some layers, 8 or 16, may cost: a share of the size "
    "without it (10%), bytes (1.5GB), 0 for none, all for a 16-bit copy. The layers are measured "
    "first, on at most 8192 tokens. [default: 0]",
)
@options.calibration_options(seq_len=512, n_tokens=131072)
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
    model, output, bits, group_size, symmetric, static_groups, damp, budget, calibration,
    n_tokens, seq_len, device, base_model, check, dry_run, force, resume, output_format, **where,
):  # fmt: skip
    """Write MODEL as GPTQ integers, calibrated on a text.

    Weights are rounded one column at a time, and the columns that follow make good each one's
    error on the inputs that the calibration text gives. Layer by layer: one is in memory at a time,
    and each sees what the quantized ones before it put out. The folder is in AutoGPTQ's format,
    which vLLM loads, and transformers with optimum and GPTQModel. With --budget the layers that 4
    bits harm most get 8 or 16, which vLLM and GPTQModel load; --dry-run measures too, and prints
    the table. After an interruption, the same command goes on.

    \b
    Examples:
      qwq-quant gptq examples/tiny-qwq -o tiny-qwq-Int4 --group-size 64
      qwq-quant gptq examples/tiny-qwq -o tiny-qwq-Int8 --bits 8
      qwq-quant gptq examples/tiny-qwq -o tiny-qwq-mixed --budget 10%
    """
    from quant.architectures import find_architecture
    from quant.budget import NOTHING
    from quant.calibration.device import choose_device
    from quant.cli.calibrating import calibration_tokens, held_out_tokens, planned_run
    from quant.cli.gptq_table import print_plan, print_written
    from quant.cli.plan_table import print_note
    from quant.cli.progress import Progress
    from quant.cli.resuming import resuming
    from quant.folder_needs import folder_estimate, folder_nbytes, works_of_gptq
    from quant.formats.gptq import Gptq
    from quant.gptq_model import plan_gptq, spend_budget
    from quant.lora import merge_notes
    from quant.source import open_checkpoint
    from quant.write_gptq import N_MODELS, check_gptq, fill_gptq, run_gptq
    from quant.write_with_feedback import check_tokens, token_notes

    checkpoint = open_checkpoint(model, check_config=find_architecture, **where)
    format = Gptq(int(bits), group_size, symmetric)
    plan = plan_gptq(checkpoint, format, damp, static_groups, budget or NOTHING)
    plan = replace(plan, notes=(*merge_notes(checkpoint.tensors), *plan.notes))
    n_measured = min(n_tokens, MEASURED_TOKENS)
    layerwise = planned_run(
        checkpoint, works_of_gptq(plan, check, n_measured), output, folder_nbytes(plan),
        calibration, n_tokens, seq_len, device, saves=resume != "never",
    )  # fmt: skip
    layerwise.needs().require()
    tokens = calibration_tokens(checkpoint, calibration, n_tokens, seq_len)
    check_tokens(plan, tokens)
    plan = replace(plan, notes=(*plan.notes, *token_notes(plan, tokens)))
    must_measure, few = plan.budget.needs_choice, None
    if must_measure or not dry_run:
        device = choose_device(device)
    if must_measure:
        few = calibration_tokens(checkpoint, calibration, n_measured, seq_len)
    if dry_run:
        if must_measure:
            plan = spend_budget(plan, _measured(plan, few, device))
        needs = layerwise.needs()
        print_plan(plan, output_format, needs, folder_estimate(layerwise, plan))
        raise click.exceptions.Exit(needs.exit_code)
    held_out = held_out_tokens(checkpoint) if check else None
    started = time.monotonic()
    n_layers = plan.groups[-1].layer + 1
    with (
        resuming(resume, "step") as resume,
        run_gptq(
            plan,
            tokens,
            output,
            force,
            options.typed_command(),
            resume,
            device=device,
            measured=few,
            held_out=held_out,
        ) as run,
    ):
        if must_measure:
            damage = run.measure(lambda passes: _measured(plan, few, device, passes))
            plan = spend_budget(plan, {name: tuple(costs) for name, costs in damage.items()})
        for note in plan.notes:
            print_note(note, err=True)

        def run_check(plan, folder):
            with Progress("Checking, layers", N_MODELS * n_layers) as bar:
                return check_gptq(plan, folder, held_out, device, bar.advance, run.passes)

        with Progress("Quantizing, layers", n_layers) as bar:
            written = fill_gptq(
                plan,
                tokens,
                run,
                device=device,
                base_model=base_model or (checkpoint.name if checkpoint.revision else None),
                progress=bar.advance,
                check=run_check if check else None,
            )
    print_written(plan, written, time.monotonic() - started, output_format)


def _measured(plan, tokens, device: str, passes=None):
    """What each group would lose, by the bits that it may have."""
    from quant.calibration.passes import UNKEPT
    from quant.calibration.streamed_model import StreamedModel
    from quant.cli.progress import Progress
    from quant.measuring.levels import measure_levels, n_steps

    model = StreamedModel(plan.checkpoint, device=device)
    with Progress("Measuring, layers", n_steps(plan, model)) as bar:
        return measure_levels(plan, model, tokens.ids, bar.advance, passes or UNKEPT)
