"""qwq-quant fix: a repaired copy of a checkpoint."""

import json
from pathlib import Path

import click

from quant.cli import options


@click.command("fix")
@click.argument("model")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write."
)
@click.option("--apply", metavar="ID,...", default="", help="Mend these findings of the doctor.")
@click.option("--all", "everything", is_flag=True, help="Mend all but what is a matter of opinion.")
@click.option("--pad-token", metavar="TOKEN", help="Make this token of the model its pad token.")
@click.option(
    "--template-think",
    type=click.Choice(["keep", "strip"]),
    default="keep",
    show_default=True,
    help="strip: the chat template no longer opens <think> for the model.",
)
@click.option(
    "--yarn", type=float, metavar="FACTOR", help="Stretch the context: 4 for 32k to 128k."
)
@click.option(
    "--recipe", metavar="NAME|FILE", help="What to expect. [default: by the model's name]"
)
@options.dry_run
@options.force
@options.output_format
@options.model_options
@options.debug
def command(model, output, apply, everything, recipe, dry_run, force, output_format, revision,
            token, cache_dir, offline, **wishes):  # fmt: skip
    """Write a repaired copy of the checkpoint MODEL.

    The weights are hard links to the source's, or copies on another file system; the source is
    never touched. The doctor examines both, and what it says before and after is printed. The
    folder appears whole, with every mended finding gone, or not at all.

    \b
    Examples:
      qwq-quant fix broken-model -o mended --all
      qwq-quant fix Qwen/QwQ-32B -o QwQ-32B-mended --pad-token '<|vision_pad|>'
      qwq-quant fix examples/tiny-qwq -o long --yarn 4
    """
    from quant.doctor.opening import open_to_examine
    from quant.fix import Wanted, fix_needs, plan_fix, write_fix

    source = open_to_examine(
        model, revision=revision, token=token, cache_dir=cache_dir, offline=offline
    )
    ids = tuple(i.strip() for i in apply.split(",") if i.strip())
    plan = plan_fix(source, recipe, Wanted(ids, everything, **wishes))
    if not plan.contents:
        _refuse_idle(plan, everything)
    needs, estimate = fix_needs(plan, output)
    if dry_run:
        _print_plan(plan, needs, estimate, output_format)
        raise click.exceptions.Exit(needs.exit_code)
    needs.require()
    fixed = write_fix(plan, output, force=force, command=options.typed_command())
    if output_format == "json":
        click.echo(json.dumps(_as_json(plan, fixed), indent=1))
    else:
        _print(plan, fixed)


def _refuse_idle(plan, everything: bool) -> None:
    """Say why there is nothing to write: no finding, none that was named, or only opinions."""
    from quant.errors import UsageError

    fixable = [f.id for f in plan.before.findings if f.check.mend]
    opinions = [f.id for f in plan.before.findings if f.check.mend and f.check.opinion]
    if not fixable:
        raise UsageError("There is nothing to mend.", "", "See: qwq-quant doctor MODEL")
    if not everything:
        raise UsageError(
            "Nothing was asked to be mended.",
            f"The doctor's findings that can be: {', '.join(dict.fromkeys(fixable))}.",
            "Name them with --apply, or use --all.",
        )
    if opinions:
        raise UsageError(
            "Nothing is left for --all to mend.",
            " ".join([f"Makers and users may differ on {', '.join(opinions)}.", *plan.notes]),
            f"Name what you want: --apply {opinions[0]}",
        )
    raise UsageError("Nothing that was found can be mended.", " ".join(plan.notes))


def _print_plan(plan, needs, estimate, output_format: str) -> None:
    """What would be changed, and what it takes."""
    from quant.cli.findings import print_report
    from quant.cli.plan_table import print_needs

    if output_format == "json":
        taken = {"needs": {**needs.as_json(), **estimate.as_json()}}
        click.echo(json.dumps({**_plan_json(plan), **taken}, indent=1))
        return
    print_report(plan.before, details=False)
    click.echo()
    _print_changes(plan)
    print_needs(needs, estimate)


def _plan_json(plan) -> dict:
    return {
        "mended": list(plan.mended),
        "changes": list(plan.notes),
        "changed_files": sorted(plan.contents),
        "before": plan.before.as_json(),
    }


def _as_json(plan, fixed) -> dict:
    return {
        "output": str(fixed.folder),
        **_plan_json(plan),
        "shards": {"linked": fixed.linked, "copied": fixed.copied},
        "after": fixed.after.as_json(),
    }


def _print(plan, fixed) -> None:
    from quant.cli.findings import print_report
    from quant.display import printable

    click.echo("Before")
    print_report(plan.before, details=False)
    click.echo("\nAfter")
    print_report(fixed.after, details=False)
    click.echo()
    _print_changes(plan)
    n, verb = (fixed.linked, "linked") if fixed.linked else (fixed.copied, "copied")
    mended = ", ".join(plan.mended) or "as asked"
    click.echo(f"{printable(fixed.folder)}: mended {mended}; shards {verb}: {n}.")


def _print_changes(plan) -> None:
    from quant.cli.plan_table import print_note
    from quant.display import printable

    for note in plan.notes:
        print_note(printable(note))
    files = ", ".join(sorted(plan.contents))
    click.echo(f"Changed: {files}")
