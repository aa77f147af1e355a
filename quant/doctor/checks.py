"""All checks, and the examination that makes them."""

from quant.doctor import family, files, gguf, rope, template, tokens
from quant.doctor.finding import SEVERITIES, Check, Finding, Report
from quant.doctor.patient import Patient
from quant.errors import QwqQuantError
from quant.inspection.facts import reason
from quant.recipe import Chosen
from quant.source import Source

ROOMS = (tokens, template, rope, family, files, gguf)

CHECKS: dict[str, Check] = {check.id: check for room in ROOMS for check in room.CHECKS}


def examine(source: Source, chosen: Chosen | None, deep: bool = False) -> Report:
    """Every check that fits the model. A file that one check cannot read does not stop the others.

    deep: also read all weights, and ask the real llama.cpp and transformers about tokens.
    """
    patient = Patient(source, chosen)
    findings, checked, not_checked = [], [], {}
    for check in CHECKS.values():
        if patient.container not in check.containers:
            continue
        if check.deep and not deep:
            not_checked[check.id] = "needs --deep"
        elif check.needs_recipe and chosen is None:
            not_checked[check.id] = "no recipe fits the model (--recipe names one)"
        else:
            try:
                findings += [Finding(check, seen) for seen in check.look(patient)]
                checked.append(check.id)
            except QwqQuantError as error:
                not_checked[check.id] = reason(error)
    order = list(SEVERITIES)
    findings.sort(key=lambda finding: order.index(finding.severity))
    return Report(
        patient.name,
        patient.container,
        chosen.recipe.name if chosen else None,
        chosen.why if chosen else "",
        tuple(findings),
        tuple(checked),
        not_checked,
    )
