"""A GPTQ plan and its outcome, as tables that fit 80 columns or as JSON."""

import json
from dataclasses import asdict

import click

from quant.cli.plan_4bit import print_curve, print_gap, print_outcome, tokens_needed
from quant.cli.plan_table import print_columns, print_needs, print_note
from quant.display import human_bytes, printable


def print_plan(plan, output_format: str, needs, estimate) -> None:
    """Groups with their errors, prices and bits; what it makes in all, and takes; notes."""
    if output_format == "json":
        taken = {"needs": {**needs.as_json(), **estimate.as_json()}}
        click.echo(json.dumps({**_plan_json(plan), **taken}, indent=1))
        return
    if plan.choice:
        _print_groups(plan)
        print_curve(plan.choice)
        click.echo()
    click.echo(f"{_summary(plan)}.")
    if plan.widest:
        click.echo(tokens_needed(plan).capitalize())
    if plan.solution:
        print_gap(plan.solution)
    print_needs(needs, estimate)
    for note in plan.notes:
        print_note(note)


def _print_groups(plan) -> None:
    """Every group, the worst damage first: damage in the fewest bits, what more cost, its bits."""
    rows = [("group", plan.choice.metric, *(f"{n} bits cost" for n in plan.ladder[1:]), "")]
    for group in sorted(plan.groups, key=lambda group: plan.damage[group.name], reverse=True):
        least, *sizes = (plan.group_nbytes(group, bits) for bits in plan.ladder)
        rows.append(
            (
                printable(group.name.removeprefix("model."), 34),
                f"{plan.damage[group.name][0]:.2e}",
                *(f"+{human_bytes(size - least)}" for size in sizes),
                f"{plan.bits_of(group)}-bit",
            )
        )
    print_columns(rows, right=tuple(range(1, len(rows[0]) - 1)))


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
    print_outcome(written)


def _summary(plan) -> str:
    counts = [
        (sum(len(group.modules) for group in plan.groups if plan.bits_of(group) == bits), bits)
        for bits in plan.ladder
    ]
    (n, bits), *more = [count for count in counts if count[0]]
    linears = "".join([f"{n} linears in {bits} bits", *(f", {n} in {bits}" for n, bits in more)])
    size = f"{human_bytes(plan.nbytes)} in all, {plan.bits_per_weight:.2f}"
    return f"{linears}, {size} bits per {'linear weight' if more else 'weight of the linears'}"


def _plan_json(plan) -> dict:
    """The whole plan, for programs."""
    content = {
        "model": plan.checkpoint.name,
        "quantization_config": plan.quantization_config,
        "budget": asdict(plan.budget),
        "nbytes": plan.nbytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "quantized": list(plan.quantized),
        "notes": list(plan.notes),
    }
    if plan.choice:
        content |= {
            "metric": plan.choice.metric,
            "groups": [_group_json(plan, group) for group in plan.groups],
            "curve": [list(point) for point in plan.choice.curve],
            "solution": asdict(plan.solution),
        }
    return content


def _group_json(plan, group) -> dict:
    """Its bits, and for each number that it could have had: damage and bytes."""
    damage = dict(zip(plan.ladder, plan.damage[group.name], strict=True))
    return {
        "name": group.name,
        "bits": plan.bits_of(group),
        "damage": damage,
        "nbytes": {bits: plan.group_nbytes(group, bits) for bits in plan.ladder},
    }
