"""Renders one Jinja template in a process of its own. Knows limits, not chats.

Run as a script: one JSON request on stdin, one JSON answer on stdout. A template is
code of a stranger: within the sandbox it can still loop or fill the memory, and only a
process can be stopped wherever it is.
"""

import json
import resource
import signal
import sys
from typing import Any


def main() -> None:
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    import jinja2.sandbox  # noqa: F401  (imports are not the template's time or memory)

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    memory = min(request["limit_bytes"], sys.maxsize if hard < 0 else hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
    # The signal has no handler: it ends the process even inside one long C call.
    signal.setitimer(signal.ITIMER_PROF, request["limit_s"])
    try:
        answer = {"text": _render(request)}
    except MemoryError:
        answer = {"error": f"needs more than {memory >> 20} MiB of memory"}
    except Exception as error:
        answer = {"error": _one_line(error)}
    json.dump(answer, sys.stdout)


def _one_line(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    where = "" if line is None else f"line {line}: "
    return where + " ".join(str(error)[:1000].split()) or type(error).__name__


def _render(request: dict[str, Any]) -> str:
    environment = _environment()
    chunks: list[str] = []
    left = request["limit_chars"]
    for chunk in environment.from_string(request["template"]).generate(
        **request["variables"]
    ):
        chunks.append(chunk)
        left -= len(chunk)
        if left < 0:
            raise ValueError(f"gives more than {request['limit_chars']:,} characters")
    return "".join(chunks)


def _environment() -> Any:
    """The environment that transformers renders chat templates in."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what a model said; it shows as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(form):
        return datetime.now().strftime(form)

    def tojson(
        value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


if __name__ == "__main__":
    main()
