"""qwq-quant plot: what was measured, as figures and a page."""

from pathlib import Path

import click

from quant.cli import options

# The names of quant.sensitivity.METRICS, written out so that --help need not import numpy; a test
# holds them against each other.
METRICS = ("weight", "activation", "block", "gradient", "kld")


@click.command("plot")
@click.argument("sensitivity", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write to; it is made if it is not there.",
)
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    help="What the first panel, the map of layers and the curve show. [default: the first measured "
    "of gradient, kld, block, activation, weight]",
)
@options.force
@options.debug
def command(sensitivity, output, metric, force):
    """Draw what `measure` or `dynamic-4bit` found out about each weight of a model.

    SENSITIVITY is the sensitivity.json of either. Writes report.html, one page that works offline
    and holds everything, and each figure as PNG and SVG with its numbers as CSV: errors of all
    weights along depth, a map of layers by kind, and predicted damage against size.

    \b
    Examples:
      qwq-quant measure examples/tiny-qwq -o sensitivity.json
      qwq-quant plot sensitivity.json -o figures
      qwq-quant plot sensitivity.json -o figures --metric weight --force
    """
    from quant.display import human_bytes, printable
    from quant.report.files import report_needs, write_files
    from quant.report.sensitivity_report import sensitivity_report
    from quant.sensitivity import read_sensitivity

    report_needs(output).require()
    files = sensitivity_report(read_sensitivity(sensitivity), metric=metric)
    write_files(output, files, force=force, sources=[sensitivity])
    for name, data in files.items():
        click.echo(f"{printable(output / name)}  {human_bytes(len(data))}")
