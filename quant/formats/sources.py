"""The state of this folder's sources: machine code made of others is out of date."""

import hashlib
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """A hash over every Python file of this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
