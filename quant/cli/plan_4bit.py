"""A 4-bit plan and its outcome, as tables that fit 80 columns or as JSON."""

import json
import math
from dataclasses import asdict

import click

from quant.cli.plan_table import print_columns, print_needs, print_note
from quant.display import human_bytes, printable

N_CURVE_ROWS = 9


def print_plan(plan, output_format: str, needs, estimate) -> None:
    """Groups with their error, price and fate; damage against size; what it takes; notes."""
    if output_format == "json":
        taken = {"needs": {**needs.as_json(), **estimate.as_json()}}
        click.echo(json.dumps({**_plan_json(plan), **taken}, indent=1))
        return
    if plan.choice:
        _print_groups(plan)
        print_curve(plan.choice)
    print_totals(plan)
    print_needs(needs, estimate)
    for note in plan.notes:
        print_note(note)


def _print_groups(plan) -> None:
    """Every group, the worst damage first."""
    values, extra = plan.sensitivity.values(plan.choice.metric), plan.extra_nbytes
    rows = [("group", plan.choice.metric, "16 bits cost", "")]
    for name in sorted(values, key=values.__getitem__, reverse=True):
        rows.append(
            (
                printable(name.removeprefix("model."), 44),
                f"{values[name]:.2e}",
                f"+{human_bytes(extra[name])}",
                "kept 16-bit" if name in plan.kept else "4-bit",
            )
        )
    print_columns(rows, right=(1, 2))


def print_curve(choice) -> None:
    """The best choice at a few sizes between nothing kept and all in 16 bits; the one chosen."""
    curve, chosen = choice.curve, choice.chosen
    plain, worst = curve[0]
    step = max(1, (len(curve) - 1) // (N_CURVE_ROWS - 1))
    points = sorted({*curve[::step], curve[-1], chosen})
    rows = [("size", "over plain", "predicted damage", "of plain", "")]
    for nbytes, damage in points:
        rows.append(
            (
                human_bytes(nbytes),
                f"+{100 * (nbytes / plain - 1):.1f} %",
                f"{damage:.2e}",
                f"{100 * damage / worst:.0f} %" if worst else "",
                "<- chosen" if (nbytes, damage) == chosen else "",
            )
        )
    click.echo()
    print_columns(rows, right=(0, 1, 2, 3))


def print_totals(plan) -> None:
    n, kept = len(plan.groups), len(plan.kept)
    click.echo(
        f"\n{n - kept} of {n} groups in {plan.format.quant_type.upper()}, {kept} kept 16-bit: "
        f"{human_bytes(plan.nbytes)}, {plan.bits_per_weight:.2f} bits per linear weight"
    )
    if plan.feedback and plan.widest:
        click.echo(f"{plan.format_name}: {tokens_needed(plan)}")
    if plan.solution:
        print_gap(plan.solution)


def tokens_needed(plan) -> str:
    return f"at least {plan.widest} tokens of calibration text are needed."


def print_gap(solution) -> None:
    """How much worse the greedy choice would be, and how far the optimum may be."""
    s = solution
    gap = "" if s.exact else f" (at most {_percent(s.damage, s.bound)} from the optimum)"
    greedy = _percent(s.greedy_damage, s.damage)
    click.echo(f"Choosing greedily by damage per byte would leave {greedy} more damage{gap}.")


def _percent(more: float, than: float) -> str:
    return f"{100 * (more / than - 1):.1f} %" if than else "0.0 %"


def _plan_json(plan) -> dict:
    """The whole plan, for programs."""
    choice, solution = plan.choice, plan.solution
    content = {
        "model": plan.checkpoint.name,
        "format": asdict(plan.format),
        "budget": asdict(plan.budget),
        "feedback": plan.feedback,
        "nbytes": plan.nbytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "kept": [group.name for group in plan.groups if group.name in plan.kept],
        "llm_int8_skip_modules": plan.skip_list,
        "notes": list(plan.notes),
    }
    if choice:
        values = plan.sensitivity.values(choice.metric)
        content |= {
            "metric": choice.metric,
            "groups": [
                {
                    "name": group.name,
                    "damage": values[group.name],
                    "extra_nbytes": plan.extra_nbytes[group.name],
                    "kept": group.name in plan.kept,
                }
                for group in plan.groups
            ],
            "curve": [list(point) for point in choice.curve],
            "solution": asdict(solution),
        }
    return content


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
    n, kept = len(plan.groups), len(plan.kept)
    click.echo(f"{printable(written.folder)}/  {human_bytes(written.nbytes)} of weights")
    click.echo(
        f"{n - kept} of {n} groups in {plan.format.quant_type.upper()}, {kept} kept 16-bit, "
        f"{plan.bits_per_weight:.2f} bits per linear weight; {seconds:.1f} s."
    )
    if plan.feedback:
        click.echo(f"{plan.format_name}, each layer on the outputs of the quantized ones before.")
    print_outcome(written)


def print_outcome(written) -> None:
    """What was unusual, and what was lost."""
    for name, damp in written.damped.items():
        print_note(f"the inputs of {printable(name)} needed a damping of {damp:g}")
    if written.results:
        click.echo()
        print_results(written.results)
        if _was_for_nothing(*written.results[-2:]):
            print_note(
                "This lost more than plain rounding did: the calibration text is too short for the "
                "model, or unlike what it was checked on. Give more --tokens, or another "
                "--calibration."
            )


def _was_for_nothing(plain, made) -> bool:
    """Whether the outcome is farther from the source than plain rounding, beyond chance."""
    return made.kld - plain.kld > 2 * math.hypot(made.kld_error, plain.kld_error)


def print_results(results) -> None:
    rows = [("", "weights", "perplexity", "KL divergence", "same top token")]
    for r in results:
        kld = "" if r.kld is None else f"{r.kld:.5f} ± {r.kld_error:.5f}"
        same = "" if r.same_top is None else f"{100 * r.same_top:.1f} %"
        perplexity = f"{r.perplexity:.3f} ± {r.perplexity_error:.3f}"
        rows.append((r.name, human_bytes(r.nbytes), perplexity, kld, same))
    print_columns(rows, right=(1, 2, 3, 4))
