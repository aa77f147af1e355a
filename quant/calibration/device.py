"""Which device a model runs on."""

import torch

from quant.display import printable
from quant.errors import Unavailable


def choose_device(name: str) -> str:
    """`name`, or for "auto" a GPU if there is one. Raises Unavailable if torch cannot use it."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).partition("\n")[0]
        raise Unavailable(
            f"The device {printable(name)} cannot be used.",
            f"torch says: {printable(first_line)}",
            "Leave --device out, or use --device cpu.",
        ) from None
    return name
