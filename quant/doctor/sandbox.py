"""A chat template rendered where it can do no harm: in a child process with limits.

`{{ 'a' * 10**9 }}` and a nest of loops pass Jinja's sandbox; the first takes the memory, the second
never ends (SSTI through a GGUF's template was CVE-2024-34359 and CVE-2026-5760). So nothing of a
template ever runs in this process.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CHILD = Path(__file__).with_name("render_child.py")

_START = (
    "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
)
"""Python's isolated mode (-I) hides the user's own packages, where jinja2 may lie."""

WALL_SECONDS = 30
"""The child has 3 seconds of processor time; this is for a machine that is busy."""

MAX_TEMPLATE = 1_000_000
"""Characters. QwQ's template has 3,000, the longest known ones 30,000."""

_DIED = {
    -24: "it used 3 seconds of processor time and did not end",  # SIGXCPU
    -9: "it was ended by the system",
    -11: "it made the interpreter crash",
}


@dataclass(frozen=True)
class Rendered:
    """A prompt, or why there is none.

    unsafe: the template reached for Python's insides; insides: those it names, reached or not.
    """

    text: str | None = None
    problem: str = ""
    unsafe: bool = False
    insides: str = ""


def render(template: str, conversations: list[dict]) -> list[Rendered]:
    """The prompt that a template makes of each conversation's variables. Runs nothing here."""
    if len(template) > MAX_TEMPLATE:
        why = f"it has {len(template):,} characters; more than {MAX_TEMPLATE:,} are not run"
        return [Rendered(problem=why)] * len(conversations)
    request = json.dumps({"template": template, "conversations": conversations})
    with tempfile.TemporaryFile() as output:  # a file, because its size can be limited
        code = _run(request, output)
        output.seek(0)
        lines = output.read().splitlines()
    rendered = [found for found in map(_read, lines) if found is not None]
    missing = len(conversations) - len(rendered)
    return rendered + [Rendered(problem=_DIED.get(code, "it ended without an answer"))] * missing


def _run(request: str, output) -> int:
    folders = {
        str(Path(spec.origin).parents[1])
        for spec in map(find_spec, ("jinja2", "markupsafe"))
        if spec is not None and spec.origin
    }
    command = [sys.executable, "-I", "-c", _START, str(CHILD), *sorted(folders)]
    try:
        return subprocess.run(
            command,
            input=request.encode(),
            stdout=output,
            stderr=subprocess.DEVNULL,
            timeout=WALL_SECONDS,
            cwd="/",
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return -24


def _read(line: bytes) -> Rendered | None:
    """One line of the child's; None for one that was cut off."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    if "text" in found:
        return Rendered(found["text"], insides=found["insides"])
    problem, stopped = f"{found['error']}: {found['message']}", found["error"] == "SecurityError"
    return Rendered(problem=problem, unsafe=stopped, insides=found["insides"])
