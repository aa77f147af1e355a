"""How many bytes may be spent on more bits, and which groups of linears get them."""

from collections.abc import Sequence
from dataclasses import dataclass

from quant.display import human_bytes, printable
from quant.errors import BadRecipe
from quant.groups import Group
from quant.report.choice import Choice
from quant.selection import Solution, pareto_curve, solve

N_CURVE_POINTS = 48


@dataclass(frozen=True)
class Budget:
    """How many bytes may be spent on keeping groups in 16 bits, or in more than the rest.

    unit: "share" of the model's bytes without it, "bytes", "bits_per_weight" of the decoder's
    linears, or "all": as many as there are.
    """

    unit: str
    value: float = 0.0

    def __str__(self) -> str:
        if self.unit == "share":
            return f"{100 * self.value:g}%"
        if self.unit == "bytes":
            return human_bytes(self.value)
        return f"{self.value:g} bits per weight" if self.unit == "bits_per_weight" else self.unit

    @property
    def is_plain(self) -> bool:
        """Nothing is to be kept: plain NF4, say."""
        return self.unit in ("share", "bytes") and self.value == 0

    @property
    def needs_choice(self) -> bool:
        return not self.is_plain and self.unit != "all"


NOTHING = Budget("share", 0.0)


@dataclass(frozen=True)
class Levels:
    """What each group may be stored in: sizes[i] are the bytes of group i, fewest bits first and 16
    last; `rest` those of all that is no group's, `experts` of these what no budget can change."""

    groups: Sequence[Group]
    sizes: Sequence[Sequence[int]]
    rest: int
    experts: int = 0

    @property
    def least(self) -> int:
        """Bytes of all groups in the fewest bits."""
        return sum(sizes[0] for sizes in self.sizes)

    def spendable(self, budget: Budget) -> int:
        """Bytes that may be spent over `least`. Raises BadRecipe if they buy nothing."""
        n_weights = sum(sizes[-1] for sizes in self.sizes) // 2
        plain = self.least + self.rest
        room = {
            "share": budget.value * (plain - self.experts),
            "bytes": budget.value,
            "bits_per_weight": budget.value * n_weights / 8 - self.least,
        }[budget.unit]
        least, name = min(
            (sizes[1] - sizes[0], group.name)
            for group, sizes in zip(self.groups, self.sizes, strict=True)
        )
        if room < least:
            bits = 8 * (self.least + least) / n_weights
            raise BadRecipe(
                f"A budget of {budget} buys nothing: the cheapest group to store in more bits, "
                f"{printable(name)}, costs {human_bytes(least)} more.",
                f"Without any, the model takes {human_bytes(plain)} "
                f"({8 * self.least / n_weights:.2f} bits per weight of its linears), so at least "
                f"{100 * least / plain:.2g} % or {bits:.2f} bits per weight are needed.",
                "Give a larger --budget, or --budget 0 for none.",
            )
        everything = sum(sizes[-1] for sizes in self.sizes) - self.least
        if room >= everything:
            raise BadRecipe(
                f"A budget of {budget} keeps all linears in 16 bits: nothing would be quantized.",
                f"It comes on top of the {human_bytes(plain)} that the model takes without one; "
                f"{human_bytes(everything)} more are all there is to spend.",
                "Give a smaller --budget.",
            )
        return int(room)

    def most_nbytes(self, budget: Budget) -> int:
        """Bytes of all tensors, at most, when it is spent. Raises BadRecipe as `spendable`."""
        if budget.unit == "all":
            return self.rest + sum(sizes[-1] for sizes in self.sizes)
        return self.rest + self.least + (self.spendable(budget) if budget.needs_choice else 0)

    def choose(
        self, metric: str, damage: Sequence[Sequence[float]], budget: Budget
    ) -> tuple[Choice, Solution]:
        """The levels with the least damage within the budget. damage: as `sizes`.

        Raises BadRecipe.
        """
        solution = solve(damage, self.sizes, self.least + self.spendable(budget))
        kept = [i for i, level in enumerate(solution.levels) if level]
        choice = Choice(
            metric,
            tuple(self.groups[i].name for i in kept),
            self.curve(damage),
            (solution.nbytes + self.rest, solution.damage),
            min((damage[i][0] for i in kept), default=None),
        )
        return choice, solution

    def curve(self, damage: Sequence[Sequence[float]]) -> tuple[tuple[int, float], ...]:
        """The best choice at sizes from the fewest bits to all in 16."""
        most = sum(sizes[-1] for sizes in self.sizes)
        # Twice as many where the first bytes are spent, which buy most: half of the points lie in
        # the first 30 %, and the budgets people give are there.
        n, early = N_CURVE_POINTS // 2, round(0.3 * (most - self.least))
        first = [self.least + early * i // n for i in range(n)]
        rest = most - self.least - early
        budgets = first + [self.least + early + rest * i // n for i in range(n + 1)]
        points = pareto_curve(damage, self.sizes, budgets)
        return tuple(dict.fromkeys((nbytes + self.rest, total) for nbytes, total in points))
