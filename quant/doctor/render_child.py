"""Renders one chat template, in a process of its own that may do nothing else.

Run by quant.doctor.sandbox, never imported: reads one JSON request on stdin, writes a JSON line for
each conversation on stdout. A template is a program that a stranger wrote. Jinja's sandbox keeps it
from Python's insides, but not from looping for ever or asking for all memory; the limits set here
do that, and also leave it no file to open and no process to start, should the sandbox fail.
"""

import encodings.ascii
import encodings.unicode_escape  # noqa: F401, both for Jinja's strings: no file opens later
import json
import resource
import sys
from datetime import datetime

import jinja2
import jinja2.debug  # else it is imported when an error is raised, and no file opens then
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 3
MEMORY = 512 << 20
MAX_TEXT = 1 << 20


class Generation(Extension):
    """{% generation %} marks what the model wrote, for training; it prints its body."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives a template. # ref: transformers, utils/chat_template_utils.py"""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def limit_this_process() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))  # SIGXCPU, then SIGKILL
    for what, limit in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 16 * MAX_TEXT),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(what, (limit, limit))


def render(template, variables: dict) -> dict:
    """{"text": ...}, or {"error": kind, "message": ...}."""
    try:
        pieces, length = [], 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_TEXT:
                return {"error": "TooLong", "message": f"more than {MAX_TEXT} characters"}
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": "MemoryError", "message": f"more than {MEMORY >> 20} MiB"}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)[:300]}


def main() -> None:
    request = json.load(sys.stdin)
    made = environment()
    limit_this_process()
    try:
        template = made.from_string(request["template"])
    except Exception as error:
        failed = {"error": type(error).__name__, "message": str(error)[:300]}
        lines = [failed] * len(request["conversations"])
    else:
        lines = (render(template, variables) for variables in request["conversations"])
    for line in lines:
        print(json.dumps(line), flush=True)


main()
