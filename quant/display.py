"""How names and sizes are shown to people, and sizes read back from them."""

import re

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def printable(text: object, limit: int = 200) -> str:
    """`text` with control characters escaped: names in a checkpoint are untrusted.

    A tensor called "\\x1b[2J" must not clear the user's terminal, nor a newline forge a log line.
    """
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)
    )
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def human_bytes(n: float) -> str:
    """Bytes in decimal units, as the hub and disks count them: 19845357568 -> "19.8 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 999.95 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500M" or "4GiB": decimal units, or binary with an i. Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no size; write for example 5GB, 500M or 4GiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[prefix.upper()])
