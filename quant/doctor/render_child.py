"""Renders one chat template, in a process of its own that may do nothing else.

Run by quant.doctor.sandbox, never imported: reads one JSON request on stdin, writes a JSON line for
each conversation on stdout. A template is a program that a stranger wrote. Jinja's sandbox keeps it
from Python's insides, but not from looping for ever or asking for all memory; the limits set here
do that, and also leave it no file to open and no process to start, should the sandbox fail.
"""

# No file opens once the limits are set: what Jinja would import while it renders comes first.
import encodings.ascii
import encodings.unicode_escape  # noqa: F401
import json
import pprint  # noqa: F401
import re
import resource
import sys
import textwrap  # noqa: F401
from datetime import datetime

import jinja2
import jinja2.constants
import jinja2.debug
from jinja2.exceptions import TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Const, Getattr, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

SECONDS = 3
MEMORY = 512 << 20
MAX_TEXT = 1 << 20

ATTRIBUTE = re.compile(r"__\w+__|(func|gi|cr|ag|tb|f)_(globals|code|frame|back|builtins|closure)")
PATH = re.compile(r"\S*__(class|mro|bases?|subclasses|globals|builtins|import|init)__\S*")
"""Names that lead to Python's insides: as an attribute, and in a text such as a format's."""


class Generation(Extension):
    """{% generation %} marks what the model wrote, for training; it prints its body."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


class Environment(ImmutableSandboxedEnvironment):
    """Refuses what its parent does, and tells an attack from messages.append(...)."""

    def unsafe_undefined(self, obj, attribute):
        value = getattr(obj, attribute, None)
        if SandboxedEnvironment.is_safe_attribute(self, obj, attribute, value):
            what = f".{attribute} of a {type(obj).__name__}"
            why = f"a template may not change what it is given: {what}"
            return self.undefined(why, exc=TemplateRuntimeError)
        return super().unsafe_undefined(obj, attribute)


def environment() -> Environment:
    """What transformers gives a template. # ref: transformers, utils/chat_template_utils.py"""
    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])

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


def names_of_insides(tree: Template) -> str:
    """Python's insides that the template names anywhere, also where no conversation leads."""
    found = {n.attr for n in tree.find_all(Getattr) if ATTRIBUTE.fullmatch(n.attr)}
    texts = (n.value for n in tree.find_all(Const) if isinstance(n.value, str))
    return ", ".join(sorted({*found, *(text for text in texts if PATH.match(text))}))[:300]


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
    except Exception as error:
        return failed(error)


def failed(error: Exception) -> dict:
    message = f"more than {MEMORY >> 20} MiB" if isinstance(error, MemoryError) else str(error)
    return {"error": type(error).__name__, "message": message[:300]}


def main() -> None:
    request = json.load(sys.stdin)
    made, insides = environment(), ""
    limit_this_process()
    try:
        tree = made.parse(request["template"])
        insides = names_of_insides(tree)
        template = made.from_string(tree)
    except Exception as error:
        lines = [failed(error)] * len(request["conversations"])
    else:
        lines = (render(template, variables) for variables in request["conversations"])
    for line in lines:
        print(json.dumps({**line, "insides": insides}), flush=True)


main()
