"""What commands that write a model share: its recipe, mending it on the way, merging a LoRA."""

from dataclasses import dataclass, replace
from typing import Any

import click


def mending_options(command):
    """--recipe NAME|FILE and --fix all|ID,..."""
    for option in reversed(
        (
            click.option(
                "--recipe",
                metavar="NAME|FILE",
                help="What is known of the model's family, see `qwq-quant recipes`. "
                "[default: by the model's name]",
            ),
            click.option(
                "--fix",
                metavar="all|ID,...",
                help="Mend these findings of `qwq-quant doctor` on the way, or all but what is a "
                "matter of opinion.",
            ),
        )
    ):
        command = option(command)
    return command


lora_option = click.option(
    "--lora",
    metavar="ADAPTER",
    help="Merge this LoRA into the weights as they are read: a folder that PEFT wrote, or org/name "
    "on the hub.",
)
"""Its value goes to quant.source.open_source."""


@dataclass(frozen=True)
class Mended:
    """A model whose small files read as they would be mended; nothing was written."""

    source: Any  # quant.source.Source
    chosen: Any  # quant.recipe.Chosen, or None
    notes: tuple[str, ...] = ()  # what was merged; the recipe, if it was asked for or used; mends


def mend(source, recipe: str | None, fix: str | None) -> Mended:
    """Choose the recipe, and carry out --fix if it was given.

    Raises UsageError, BadInput or BadRecipe for a mend that cannot be made.
    """
    from quant.lora import merge_notes
    from quant.recipe import choose_recipe

    merged = tuple(merge_notes(source.tensors))
    if fix is not None:
        mended = _fixed(source, recipe, fix)
        return replace(mended, notes=(*merged, *mended.notes))
    chosen = choose_recipe(source, recipe)
    return Mended(source, chosen, (*merged, *(() if recipe is None else (_recipe_note(chosen),))))


def _fixed(source, recipe: str | None, fix: str) -> Mended:
    from quant.display import printable
    from quant.errors import UsageError
    from quant.fix import mended_checkpoint, plan_fix

    try:
        plan = plan_fix(source, recipe, _wanted(fix))
    except UsageError as error:  # in the words of `qwq-quant fix`
        what = error.what.replace("--apply", "--fix")
        raise UsageError(what, error.why, error.next_step) from None
    done = f"mended {', '.join(plan.mended)}" if plan.mended else "nothing had to be mended"
    notes = (done, *(printable(note, 600) for note in plan.notes))
    return Mended(mended_checkpoint(plan), plan.chosen, (_recipe_note(plan.chosen), *notes))


def _wanted(fix: str):
    """`all` or `pad-is-eos,eos-disagree` as wishes. Raises UsageError for nothing."""
    from quant.errors import UsageError
    from quant.fix import Wanted

    ids = [check_id.strip() for check_id in fix.split(",") if check_id.strip()]
    if not ids:
        raise UsageError("--fix names nothing.", "", "Write --fix all, or ids: --fix pad-is-eos")
    return Wanted(tuple(i for i in ids if i != "all"), everything="all" in ids)


def _recipe_note(chosen) -> str:
    """Which recipe it is, and why."""
    from quant.display import printable

    if chosen is None:
        return "no recipe fits the model; --recipe names one"
    return f"recipe {chosen.recipe.name} ({printable(chosen.why)})"
