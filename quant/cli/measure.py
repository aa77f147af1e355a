"""qwq-quant measure: what 4 bits do to each layer of a model, as a file."""

import time

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
@options.force
@options.model_options
@options.debug
def command(
    model, output, metrics, quant_type, double_quant, search_scales, calibration, n_tokens,
    seq_len, device, force, **where,
):  # fmt: skip
    """Measure what 4 bits do to each layer of MODEL, for dynamic-4bit and plot.

    Runs the checkpoint over a text, one decoder layer in memory at a time.

    \b
    Examples:
      qwq-quant measure examples/tiny-qwq -o sensitivity.json
      qwq-quant dynamic-4bit examples/tiny-qwq -o tiny-qwq-4bit \\
          --sensitivity sensitivity.json
      qwq-quant plot sensitivity.json -o figures
    """
    from quant.architectures import find_architecture
    from quant.cli.measuring import run_measurement
    from quant.cli.plan_table import print_note
    from quant.display import printable
    from quant.formats.nf4 import Bnb4bit
    from quant.lora import merge_notes
    from quant.output_file import check_output_file
    from quant.sensitivity import write_sensitivity
    from quant.source import open_checkpoint, source_files

    checkpoint = open_checkpoint(model, check_config=find_architecture, **where)
    check_output_file(
        output,
        force=force,
        sources=source_files(checkpoint),
        starts_with=b'{\n "qwq',  # not {: config.json may be one mistyped name away
        kind="file of sensitivities",
    )
    for note in merge_notes(checkpoint.tensors):
        print_note(note, err=True)
    started = time.monotonic()
    format = Bnb4bit(quant_type, double_quant, search_scales=search_scales)
    measured = run_measurement(checkpoint, format, metrics, calibration, n_tokens, seq_len, device)
    write_sensitivity(output, measured)
    click.echo(
        f"{printable(output)}  {len(measured.groups)} groups by {', '.join(measured.metrics)}, "
        f"in {time.monotonic() - started:.1f} s."
    )
