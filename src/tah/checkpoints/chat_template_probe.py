"""Render a chat template under limits; run as a program by `chat_template.py`, without this package or transformers.

Reads JSON from standard input, writes `fine` or `fault: WHY`, or is killed on the way.
"""

from __future__ import annotations

import json
import sys
from typing import Any

SECONDS = 3  # of the processor
BYTES = 2**30  # of memory
LONGEST = 10**6  # characters; the conversations have some dozen words


class Refused(Exception):
    """Raised by a template, through `raise_exception`, for a conversation that it does not take."""


def limit() -> None:
    """Have the system count this process's seconds and bytes, where it can."""
    try:
        import resource
    except ImportError:  # Windows; the parent watches the clock
        return
    for what, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, BYTES), (resource.RLIMIT_CORE, 0)):
        try:
            hard = resource.getrlimit(what)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (most, most))
        except (ValueError, OSError):  # macOS has no limit of addresses
            continue


def environment() -> Any:
    """Jinja as transformers sets it up for templates."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, with which transformers marks answers: what is inside, and nothing else."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: Any) -> None:
        raise Refused(message)

    def as_json(value: Any, indent: Any = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = as_json
    made.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "26 Jul 2024"}
    return made


def fault(template: str, words: dict[str, str]) -> str:
    """Why a template cannot be used; empty where it can, or where it only refuses these conversations."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    try:
        made = environment().from_string(template)
    except TemplateSyntaxError as error:
        return f"cannot be read: line {error.lineno}: {error.message}"
    except RecursionError:
        return "cannot be read: too much stands within something else"
    except (MemoryError, OverflowError):
        return "takes more time or memory than a template may; remove it, or use another"
    turns = [{"role": "user", "content": "Is 91 prime?"}, {"role": "assistant", "content": "No: 7 times 13."}]
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        for messages, start in (([*system, *turns], False), ([*system, *turns, turns[0]], True)):
            try:
                rendered = made.render(messages=messages, add_generation_prompt=start, tools=None, **words)
            except SecurityError as error:
                return f"does what the sandbox does not let it: {error}"
            except (MemoryError, RecursionError, OverflowError) as error:
                return f"takes more than a template may ({str(error) or type(error).__name__})"
            except Exception:  # noqa: S112, BLE001  # this conversation is not for it; the real one may be
                continue
            if len(rendered) > LONGEST:
                return f"writes {len(rendered):,} characters around a few words"
    return ""


def main() -> None:
    asked = json.load(sys.stdin)
    sys.path[:] = asked["places"]
    try:
        import jinja2  # noqa: F401
    except ImportError:  # nor will transformers render it
        print("fine", flush=True)
        return
    limit()
    why = " ".join(str(fault(asked["template"], asked["words"])).split())
    print(f"fault: {why[:300]}" if why else "fine", flush=True)


if __name__ == "__main__":
    main()
