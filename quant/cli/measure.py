"""qwq-quant measure: what 4 bits do to each layer of a model, as a file."""

import time
from dataclasses import asdict, replace

import click

from quant.cli import options
from quant.cli.mending import lora_option


@click.command("measure")
@click.argument("model")
@click.option("-o", "--output", required=True, type=options.Output(), help="File to write (JSON).")
@click.option(
    "--metric",
    "metrics",
    type=click.Choice(options.METRICS),
    multiple=True,
    default=("activation", "gradient"),
    show_default=True,
    help="weight: error of the weights; activation: of each layer's output; block: of the "
    "residual stream; gradient: predicted KL divergence, from a backward pass; kld: KL "
    "divergence with that group alone in 4 bits (slow). weight is always measured. Repeatable.",
)
@options.format_4bit_options
@options.calibration_options(seq_len=256, n_tokens=8192)
@lora_option
@options.dry_run
@options.force
@options.resume
@options.model_options
@options.debug
def command(
    model, output, metrics, quant_type, double_quant, search_scales, calibration, n_tokens,
    seq_len, device, dry_run, force, resume, **where,
):  # fmt: skip
    """Measure what 4 bits do to each layer of MODEL, for dynamic-4bit and plot.

    Runs the checkpoint over a text, one decoder layer in memory at a time. After an interruption,
    the same command goes on.

    \b
    Examples:
      qwq-quant measure examples/tiny-qwq -o sensitivity.json
      qwq-quant dynamic-4bit examples/tiny-qwq -o tiny-qwq-4bit \\
          --sensitivity sensitivity.json
      qwq-quant plot sensitivity.json -o figures
    """
    from quant.architectures import find_architecture
    from quant.calibration.needs import numbers_nbytes, of_metrics
    from quant.cli.calibrating import calibration_tokens, planned_run, preflight
    from quant.cli.measuring import check_enough
    from quant.cli.plan_table import print_note
    from quant.cli.progress import Progress
    from quant.cli.resuming import resuming
    from quant.display import printable
    from quant.dynamic_4bit import find_quantizable, output_dtype
    from quant.formats.nf4 import Bnb4bit
    from quant.journal import interrupted_job
    from quant.lora import merge_notes
    from quant.output_file import check_output_file
    from quant.sensitivity import encode_sensitivity
    from quant.source import open_checkpoint, source_files

    checkpoint = open_checkpoint(model, check_config=find_architecture, **where)
    sources = source_files(checkpoint)

    def check() -> None:
        check_output_file(
            output,
            force=force,
            sources=sources,
            starts_with=b'{\n "qwq',  # not {: config.json may be one mistyped name away
            kind="file of sensitivities",
        )

    if interrupted_job(output) is None:  # else it may have written the output itself
        check()
    run = planned_run(
        checkpoint, of_metrics(metrics, checkpoint), output, numbers_nbytes(checkpoint),
        calibration, n_tokens, seq_len, device, saves=resume != "never",
    )  # fmt: skip
    preflight(run, dry_run)
    for note in merge_notes(checkpoint.tensors):
        print_note(note, err=True)
    started = time.monotonic()
    format = Bnb4bit(quant_type, double_quant, search_scales=search_scales)
    find_quantizable(checkpoint)
    dtype = output_dtype(checkpoint)
    metrics, tokens = frozenset(metrics), None
    if metrics - {"weight"}:
        tokens = calibration_tokens(checkpoint, calibration, n_tokens, seq_len)
        check_enough(tokens)

    from quant.calibration.computed import what_decides, write_computed
    from quant.calibration.device import choose_device
    from quant.calibration.streamed_model import StreamedModel
    from quant.measuring.measure import measure, n_steps, n_units

    streamed = StreamedModel(checkpoint, device=choose_device(device))

    def compute(passes) -> tuple[bytes, str]:
        found = measure(streamed, tokens, format, dtype, metrics, bar.advance, passes)
        said = f"{len(found.groups)} groups by {', '.join(found.metrics)}"
        return encode_sensitivity(found), said

    decides = what_decides(
        streamed, tokens, command="measure", metrics=sorted(metrics), **asdict(format)
    )
    total, n_layers = n_units(streamed, tokens, metrics), n_steps(streamed, tokens, metrics)
    with Progress("Measuring, layers", n_layers) as bar, resuming(resume, "layer") as how:
        how = replace(how, command=options.typed_command())
        said = write_computed(output, decides, how, streamed, total, compute, check)
    click.echo(f"{printable(output)}  {said}, in {time.monotonic() - started:.1f} s.")
