"""Groups of commands: sections in the help, and a group that is also a command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from typer.core import TyperGroup

from .names import words

PANELS = ("Use", "Train", "Evaluate", "Understand", "Serve")  # the sections of `tah --help`, in this order
LONGEST = 1000  # maximum characters of a help line, so large that lines wrap and are never cut


class Group(TyperGroup):
    """A group whose help has sections and uncut lines, and whose error for an unknown command names the nearest one."""

    def sections(self) -> dict[str, dict[str, Any]]:
        """Return the visible commands by section."""
        found: dict[str, dict[str, Any]] = {panel: {} for panel in PANELS}
        command: Any
        for name, command in self.commands.items():
            if not command.hidden:
                found.setdefault(command.rich_help_panel or "Commands", {})[name] = command
        return {panel: commands for panel, commands in found.items() if commands}

    def visible(self) -> list[str]:
        """Return the names of the visible commands."""
        return [name for commands in self.sections().values() for name in commands]

    def walk(self, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
        """Yield the name, such as `eval compare`, and the command of all visible commands at any level."""
        for commands in self.sections().values():
            for name, command in commands.items():
                inner = (
                    command.walk((*names, name))
                    if isinstance(command, Group)
                    else [(" ".join((*names, name)), command)]
                )
                yield from inner

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of the help."""
        width = max(map(len, self.visible()))
        for title, commands in self.sections().items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{name:<{width}}", command.get_short_help_str(LONGEST)) for name, command in commands.items()]
                )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that `args` begin with."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(words.unknown("command", args[0], self.visible()))
        return super().resolve_command(ctx, args)


class DefaultGroup(Group):
    """A group that is also a command: `tah eval MODEL` beside `tah eval compare A B`.

    Its hidden command of the same name runs if the first argument names no other command of the group.
    """

    @property
    def default(self) -> Any:
        """The hidden command with the name of the group."""
        return self.commands[self.name or ""]

    def walk(self, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
        """Yield the group itself, then its visible commands."""
        yield " ".join(names), self.default
        yield from super().walk(names)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the name of the default command before its arguments, unless they begin with a mistyped command."""
        if args and args[0] not in self.commands and self.is_mistyped(args[0]):
            ctx.fail(words.unknown("command", args[0], self.visible()))
        if not args or args[0] not in self.commands or args[0] == self.name:
            end = args.index("--") if "--" in args else len(args)
            is_help = set(ctx.help_option_names) & set(args[:end])
            args = ["--help"] if is_help else [self.name or "", *args]
        return super().parse_args(ctx, args)

    def is_mistyped(self, word: str) -> bool:
        """Return whether `word` resembles a command, and is neither an option nor a model."""
        is_other = word.startswith("-") or word in words.MODELS or "/" in word or os.path.exists(word)
        return not is_other and words.nearest(word, self.visible()) is not None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the default command, then the other commands."""
        own = type(ctx)(self.default, info_name=ctx.info_name, parent=ctx.parent)
        self.default.format_help(own, formatter)
        self.format_commands(ctx, formatter)

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the line of the group in the list of commands: the default command, and the names of the others."""
        line: str = self.default.get_short_help_str(limit)
        return f"{line.removesuffix('.')}; also {', '.join(self.visible())}."
