"""Render a chat template under limits. `chat_template.py` runs this file as a program.

The program imports neither this package nor transformers. It reads JSON from standard input and writes `fine` or
`fault: WHY`, unless the system kills it first.
"""

from __future__ import annotations

import json
import sys
from typing import Any

SECONDS = 3  # limit of CPU time
BYTES = 2**30  # limit of memory
LONGEST = 10**6  # characters of a rendered text; the conversations have a few dozen words


class Refused(Exception):
    """A template called `raise_exception` for a conversation that it does not support."""


def limit() -> None:
    """Limit the CPU time and memory of this process if the system can."""
    try:
        import resource
    except ImportError:  # Windows; the timeout of the parent process applies
        return
    for what, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, BYTES), (resource.RLIMIT_CORE, 0)):
        try:
            hard = resource.getrlimit(what)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (most, most))
        except (ValueError, OSError):  # macOS does not support RLIMIT_AS
            continue


def environment() -> Any:
    """Return a jinja environment with the settings of transformers."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """The tag `{% generation %}`, by which transformers marks answers. It renders as its content."""

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
    """Return the reason why a template cannot be used.

    The result is empty if the template works, or if it only raises an error of its own for these conversations.
    """
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
            except Exception:  # noqa: S112, BLE001  # the template may still support the conversations of the user
                continue
            if len(rendered) > LONGEST:
                return f"writes {len(rendered):,} characters around a few words"
    return ""


def main() -> None:
    asked = json.load(sys.stdin)
    sys.path[:] = asked["places"]
    try:
        import jinja2  # noqa: F401
    except ImportError:  # transformers then cannot render the template either
        print("fine", flush=True)
        return
    limit()
    why = " ".join(str(fault(asked["template"], asked["words"])).split())
    print(f"fault: {why[:300]}" if why else "fine", flush=True)


if __name__ == "__main__":
    main()
