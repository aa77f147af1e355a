"""What differs between two models: the facts and the tensor kinds that are not equal.

Two containers can be compared too. A fact that only one container can have (`Fact.own`) and
tensors that one of them computes are then no difference; a model and its own GGUF file differ in
the file alone. The weights' values are not compared.
"""

from dataclasses import dataclass

from quant.inspection.describe import Description
from quant.inspection.facts import Fact, Section
from quant.inspection.tensor_kinds import NOT_PARAMETERS, TensorKind


@dataclass(frozen=True)
class Difference:
    """A fact that two models do not share; None where a model has no such fact."""

    section: Section  # of the first model
    key: str
    label: str
    a: Fact | None
    b: Fact | None


@dataclass(frozen=True)
class Comparison:
    """What differs between two models."""

    a: Description
    b: Description
    facts: tuple[Difference, ...]
    tensors: tuple[tuple[TensorKind | None, TensorKind | None], ...]

    @property
    def identical(self) -> bool:
        return not self.facts and not self.tensors

    def as_json(self) -> dict:
        """Both descriptions, and their differences as pairs of raw values."""
        return {
            "models": [self.a.as_json(), self.b.as_json()],
            "identical": self.identical,
            "differences": [
                {
                    "section": d.section.key,
                    "fact": d.key,
                    "values": [fact and fact.value for fact in (d.a, d.b)],
                }
                for d in self.facts
            ],
            "tensors": [[kind and kind.as_json() for kind in pair] for pair in self.tensors],
        }


def compare(a: Description, b: Description) -> Comparison:
    """The facts and tensor kinds that differ, in the order of the first model's."""
    same = a.container == b.container
    facts = tuple(
        difference
        for section_a, section_b in zip(a.sections, b.sections, strict=True)
        for difference in _compare_sections(section_a, section_b, same)
    )
    kinds_a, kinds_b = ({kind.name: kind for kind in d.tensors} for d in (a, b))
    pairs = [(kinds_a.get(name), kinds_b.get(name)) for name in {**kinds_a, **kinds_b}]
    return Comparison(a, b, facts, tuple(pair for pair in pairs if _kinds_differ(*pair, same)))


def _compare_sections(a: Section, b: Section, same_container: bool) -> list[Difference]:
    if a.problem != b.problem:
        told = (Fact("problem", s.problem, s.problem) if s.problem else None for s in (a, b))
        return [Difference(a, "problem", "", *told)]
    facts_a, facts_b = ({fact.key: fact for fact in section.facts} for section in (a, b))
    differences = []
    for key in {**facts_a, **facts_b}:
        fact_a, fact_b = facts_a.get(key), facts_b.get(key)
        one = fact_a or fact_b
        if fact_a and fact_b:
            differs = fact_a.value != fact_b.value
        else:
            differs = same_container or not one.own
        if differs:
            differences.append(Difference(a, key, one.label, fact_a, fact_b))
    return differences


def _kinds_differ(a: TensorKind | None, b: TensorKind | None, same_container: bool) -> bool:
    """Whether shapes, types or bytes differ; experts may be stacked or not."""
    if a is None or b is None:
        return same_container or (a or b).name not in NOT_PARAMETERS
    return (a.shapes, a.types, a.nbytes) != (b.shapes, b.types, b.nbytes)
