"""A check, what it saw, and the finding that comes of both."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = {
    ERROR: "answers are wrong or never end, or a program refuses the model",
    WARNING: "goes wrong in some use or program that is common",
    NOTE: "worth knowing; the makers may have meant it so",
}

CHECKPOINT, GGUF = "checkpoint", "gguf"


@dataclass(frozen=True)
class Seen:
    """One thing that a check saw. The texts may hold names from files: untrusted."""

    what: str  # one sentence: what is wrong
    where: str  # "tokenizer_config.json: pad_token"
    evidence: str  # the values themselves


@dataclass(frozen=True)
class Check:
    """A known defect: how it is seen, what it does to people, how it is mended."""

    id: str
    severity: str
    containers: tuple[str, ...]
    about: str  # what is looked at, for the list of checks
    look: Callable[..., Iterable[Seen]]  # of the Patient
    because: str  # what goes wrong, and for whom
    remedy: str  # what `fix` does, or why this is only told
    mend: Callable[..., None] | None = None  # of the Repair and the Patient
    opinion: bool = False  # mended only when named: makers and users may differ
    needs_recipe: bool = False
    deep: bool = False  # reads weights or asks other programs


@dataclass(frozen=True)
class Finding:
    """A defect that this model has."""

    check: Check
    seen: Seen

    @property
    def id(self) -> str:
        return self.check.id

    @property
    def severity(self) -> str:
        return self.check.severity

    def as_json(self) -> dict:
        return {
            "id": self.id,
            "severity": self.severity,
            "what": self.seen.what,
            "where": self.seen.where,
            "evidence": self.seen.evidence,
            "because": self.check.because,
            "remedy": self.check.remedy,
            "fix": self.check.mend is not None,
            "only_when_named": self.check.opinion,
        }


@dataclass(frozen=True)
class Report:
    """All findings of one examination, worst first, and the checks that were not made."""

    model: str
    container: str
    recipe: str | None
    recipe_why: str
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    not_checked: dict[str, str]  # id -> why

    def of(self, *severities: str) -> list[Finding]:
        return [f for f in self.findings if f.severity in severities]

    def as_json(self) -> dict:
        return {
            "model": self.model,
            "container": self.container,
            "recipe": self.recipe,
            "recipe_why": self.recipe_why,
            "findings": [finding.as_json() for finding in self.findings],
            "checked": list(self.checked),
            "not_checked": self.not_checked,
        }
