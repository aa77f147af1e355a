"""qwq-quant verify: is an output still what was written, and does it run?"""

import json
import textwrap
from pathlib import Path

import click

from quant.cli import options

INDENT = " " * 21


@click.command("verify")
@click.argument("output", type=click.Path(path_type=Path))
@options.output_format
@options.debug
def command(output, output_format):
    """Check OUTPUT: its hashes, its structure, what it says, and that it runs.

    OUTPUT is a .gguf file (of a split one, any part), the folder of a quantized model, or a folder
    that holds several outputs. Every file is held against the hashes in qwq-quant.json, the
    container is parsed, settings that programs would misread are looked for, and the model is
    loaded once, in llama.cpp or transformers, to predict one token. Nothing is changed.

    Exit code: 0, or 65 if a check failed. A check that cannot be made says why and is no failure.

    \b
    Examples:
      qwq-quant verify tiny-qwq-Q8_0.gguf
      qwq-quant verify tiny-qwq-4bit --format json
    """
    from quant.cli.progress import BytesProgress
    from quant.errors import BadInput
    from quant.verify import FAILED, find_outputs, verify

    outputs = find_outputs(output)
    outcomes = {}
    with BytesProgress("Verifying", sum(each.nbytes for each in outputs)) as bar:
        for each in outputs:
            outcomes[str(each.path)] = verify(each, bar.advance)
            if output_format == "human":
                _print(each.path, outcomes[str(each.path)])
    if output_format == "json":
        found = {path: [vars(outcome) for outcome in of] for path, of in outcomes.items()}
        click.echo(json.dumps(found, indent=1))
    failed = any(outcome.state == FAILED for of in outcomes.values() for outcome in of)
    return BadInput.exit_code if failed else 0


def _print(path: Path, outcomes: list) -> None:
    """A line for each check, evidence wrapped at 80 columns."""
    from quant.display import printable

    click.echo(printable(path, 80))
    for outcome in outcomes:
        label = f"{outcome.check:<10} {outcome.state:<9} "
        evidence = printable(outcome.evidence, 600)
        click.echo(textwrap.fill(evidence, 80, initial_indent=label, subsequent_indent=INDENT))
