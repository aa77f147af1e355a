"""A GPTQ plan and its outcome, as lines for people or as JSON."""

import json
from dataclasses import asdict

import click

from quant.cli.plan_4bit import print_results
from quant.cli.plan_table import print_note
from quant.display import human_bytes, printable


def print_plan(plan, output_format: str) -> None:
    """What will be integers, how large it will be; notes. On stdout."""
    if output_format == "json":
        click.echo(json.dumps(_plan_json(plan), indent=1))
        return
    click.echo(_summary(plan) + ".")
    click.echo(f"At least {plan.widest} tokens of calibration text are needed.")
    for note in plan.notes:
        print_note(note)


def print_written(plan, written, seconds: float, output_format: str) -> None:
    """What was written and what it lost."""
    if output_format == "json":
        content = {
            **_plan_json(plan),
            "folder": str(written.folder),
            "nbytes": written.nbytes,
            "damped": written.damped,
            "results": [asdict(result) for result in written.results],
        }
        click.echo(json.dumps(content, indent=1))
        return
    click.echo(f"{printable(written.folder)}/  {human_bytes(written.nbytes)} of weights")
    click.echo(f"{_summary(plan)}; {seconds:.1f} s.")
    for name, damp in written.damped.items():
        print_note(f"the inputs of {printable(name)} needed a damping of {damp:g}")
    if written.results:
        click.echo()
        print_results(written.results)


def _summary(plan) -> str:
    return (
        f"{len(plan.quantized)} linears in {plan.format.bits} bits, {human_bytes(plan.nbytes)} in "
        f"all, {plan.bits_per_weight:.2f} bits per weight of the linears"
    )


def _plan_json(plan) -> dict:
    """The whole plan, for programs."""
    return {
        "model": plan.checkpoint.name,
        "quantization_config": plan.quantization_config,
        "nbytes": plan.nbytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "quantized": list(plan.quantized),
        "notes": list(plan.notes),
    }
