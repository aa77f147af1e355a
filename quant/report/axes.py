"""Log axes with a few plain labels, whatever is put on them."""

from collections.abc import Sequence
from math import ceil, floor, log10

from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

MOST_TICKS = 8


def log_range(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a log axis. Zeros are drawn on its lower end, below the least positive value."""
    positive = [min(max(value, 1e-30), 1e30) for value in values if value > 0] or [1e-9]
    low = min(positive) / (2 if len(positive) < len(values) else 1)
    return low, max(max(positive), 1.1 * low)


def within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def log_axis(axis: Axis, low: float, high: float, room: float = 0.08) -> None:
    """A log axis from `low` to `high`, and `room` of its length more at both ends."""
    margin = (high / low) ** room
    low, high = low / margin, high * margin
    axis.axes.set_yscale("log")
    axis.axes.set_ylim(low, high)
    axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_power))


def _log_ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers between `low` and `high`: as fine as there is room for."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    stride = ceil(len(powers) / MOST_TICKS)
    for factors in ((1, 1.5, 2, 3, 5, 7), range(1, 10), (1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{f}e{power}") for power in powers[::stride] for f in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if 3 <= len(ticks) <= MOST_TICKS:
            return ticks
    return [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def _power(value: float, _position=None) -> str:
    """ "0.02" or "2×10⁻⁵"."""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    exponent = floor(log10(value) + 1e-9)
    factor = f"{value / 10.0**exponent:.3g}"
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if factor == "1" else f"{factor}×{power}"
