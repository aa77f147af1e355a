"""What the doctor found, as a table and as paragraphs that fit 80 columns."""

import textwrap

import click

from quant.cli.plan_table import print_columns
from quant.display import printable

WIDTH, LABEL = 80, 9


def print_report(report, details: bool = True) -> None:
    """The table of findings, then what each one does and how it is mended."""
    click.echo(printable(report.model, WIDTH))
    if report.recipe:
        _wrapped("Recipe", f"{report.recipe} ({report.recipe_why})")
    else:
        _wrapped("Recipe", "none fits the model; --recipe names one")
    if report.findings:
        click.echo()
        print_columns([("", "finding", "where"), *map(_row, report.findings)])
    for finding in report.findings if details else ():
        _print_finding(finding)
    click.echo(f"\n{_summary(report)}")
    if not details:
        return
    by_reason: dict[str, list[str]] = {}
    for check_id, why in report.not_checked.items():
        by_reason.setdefault(why, []).append(check_id)
    for why, ids in by_reason.items():
        _wrapped("", f"Not checked: {', '.join(ids)} ({why.rstrip('.')}).", indent=0)


def _row(finding) -> tuple[str, str, str]:
    return finding.severity, finding.id, printable(finding.seen.where, WIDTH - 36)


def _print_finding(finding) -> None:
    seen, check = finding.seen, finding.check
    click.echo()
    _wrapped("", f"{finding.id}: {seen.what}", indent=0)
    _wrapped("seen", seen.evidence)
    _wrapped("harm", check.because)
    _wrapped("remedy", check.remedy)


def _wrapped(label: str, text: str, indent: int = LABEL) -> None:
    """Untrusted text, safe to print, behind a label; at most six lines."""
    lines = textwrap.wrap(printable(text, 600), WIDTH - indent, max_lines=6, placeholder=" …")
    for i, line in enumerate(lines):
        click.echo(f"{label if i == 0 else '':<{indent}}{line}".rstrip())


def _summary(report) -> str:
    """ "1 error, 2 warnings, 1 note; 24 checks made." """
    counts = [(len(report.of(severity)), severity) for severity in ("error", "warning", "note")]
    found = ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for n, name in counts if n)
    return f"{found or 'No findings'}; {len(report.checked)} checks made."
