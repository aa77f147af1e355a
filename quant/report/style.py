"""The look of every figure and page: colours, markers, type; light and dark.

A figure is drawn in the light colours. In a page each becomes a CSS variable, so that one drawing
serves both. Kinds of weights differ by colour and by marker: who sees no colours reads the
markers. The colours are those of Okabe and Ito (jfly.uni-koeln.de/color), with slate for black
and without the yellow, which white paper swallows.
"""

from typing import NamedTuple


class Colour(NamedTuple):
    """One role, on light and on dark paper. No two roles have the same light colour."""

    light: str
    dark: str


COLOURS = {
    "paper": Colour("#f6f7f9", "#0f1317"),  # behind everything
    "surface": Colour("#ffffff", "#171c22"),  # behind figures and tables
    "ink": Colour("#1b232d", "#e4e8ed"),
    "muted": Colour("#5a6675", "#9aa6b4"),  # labels, notes
    "rule": Colour("#dfe3e8", "#2b333d"),  # grids, borders
    "accent": Colour("#00609a", "#6cb8ee"),  # links, what was chosen
    "q": Colour("#0072b2", "#2f8fd0"),
    "k": Colour("#56b4e9", "#a5dcff"),
    "v": Colour("#009e73", "#2fbf95"),
    "o": Colour("#cc79a7", "#c96ba0"),
    "gate": Colour("#e69f00", "#edb02e"),
    "up": Colour("#3f4a56", "#dce1e7"),
    "down": Colour("#d55e00", "#e06020"),
}


class Kind(NamedTuple):
    """How a kind of weight is drawn."""

    colour: str  # a key of COLOURS
    marker: str  # matplotlib's letter
    label: str


KINDS = {
    "q": Kind("q", "o", "q"),
    "k": Kind("k", "s", "k"),
    "v": Kind("v", "^", "v"),
    "qkv": Kind("q", "o", "q k v"),  # a group, or one weight where a checkpoint stores it so
    "o": Kind("o", "D", "o"),
    "gate": Kind("gate", "v", "gate"),
    "up": Kind("up", "P", "up"),
    "gate_up": Kind("gate", "v", "gate up"),
    "down": Kind("down", "X", "down"),
    "other": Kind("muted", "*", "other"),
}
"""In the order of a forward pass."""

N_SHADES = 16
"""Steps of the scale of a heat map: `shade-0` is next to the paper, `shade-15` is the worst."""

_RAMPS = (
    ("#eaf1f7", "#bcd8ec", "#6fb0d8", "#2a7ab5", "#0b3a6b"),
    ("#1f2933", "#24506f", "#2a7fb3", "#72bdea", "#d8efff"),
)
"""Light and dark: one hue from faint to strong; lightness alone tells more from less."""


def _between(ramp: tuple[str, ...], share: float) -> str:
    """The colour at `share` (0 to 1) of a ramp of evenly spaced colours."""
    i = min(int(share * (len(ramp) - 1)), len(ramp) - 2)
    weight = share * (len(ramp) - 1) - i
    ends = [[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in ramp[i : i + 2]]
    mixed = (round(a + (b - a) * weight) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


COLOURS |= {
    f"shade-{i}": Colour(*(_between(ramp, i / (N_SHADES - 1)) for ramp in _RAMPS))
    for i in range(N_SHADES)
}

FIGURE_WIDTH = 10.0  # inches

MATPLOTLIB = {
    "axes.edgecolor": COLOURS["rule"].light,
    "axes.facecolor": COLOURS["surface"].light,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": COLOURS["muted"].light,
    "axes.labelsize": 8.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": COLOURS["ink"].light,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "figure.dpi": 160,
    "figure.facecolor": COLOURS["surface"].light,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same bytes on every machine
    "font.size": 8.5,
    "grid.color": COLOURS["rule"].light,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handletextpad": 0.3,
    "legend.columnspacing": 1.4,
    "legend.labelcolor": COLOURS["ink"].light,
    "savefig.dpi": 160,
    "svg.fonttype": "none",  # text stays text: found, copied, read aloud
    "svg.hashsalt": "qwq-quant",  # else random ids
    "text.color": COLOURS["ink"].light,
    "text.parse_math": False,  # names are untrusted: "$" is a dollar
    "xtick.color": COLOURS["muted"].light,
    "xtick.major.size": 3,
    "ytick.color": COLOURS["muted"].light,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
"""matplotlib's settings; whatever is not here is matplotlib's own default, not the user's."""
