"""Groups of commands: sections in the help, and a group that is a command itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from typer.core import TyperGroup

from .names import words

PANELS = ("Use", "Train", "Evaluate", "Understand", "Serve")  # the sections of `tah --help`, in this order
LONGEST = 1000  # characters of a line of help, which is wrapped and not cut


class Group(TyperGroup):
    """Commands in sections by purpose, with whole lines of help, and the nearest command for an unknown one."""

    def sections(self) -> dict[str, dict[str, Any]]:
        """The visible commands by section."""
        found: dict[str, dict[str, Any]] = {panel: {} for panel in PANELS}
        command: Any
        for name, command in self.commands.items():
            if not command.hidden:
                found.setdefault(command.rich_help_panel or "Commands", {})[name] = command
        return {panel: commands for panel, commands in found.items() if commands}

    def visible(self) -> list[str]:
        """The names of the visible commands."""
        return [name for commands in self.sections().values() for name in commands]

    def walk(self, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
        """The visible commands at any level, each with its name: `eval compare`."""
        for commands in self.sections().values():
            for name, command in commands.items():
                inner = (
                    command.walk((*names, name))
                    if isinstance(command, Group)
                    else [(" ".join((*names, name)), command)]
                )
                yield from inner

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the sections."""
        width = max(map(len, self.visible()))
        for title, commands in self.sections().items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{name:<{width}}", command.get_short_help_str(LONGEST)) for name, command in commands.items()]
                )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` begin with."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(words.unknown("command", args[0], self.visible()))
        return super().resolve_command(ctx, args)


class DefaultGroup(Group):
    """A group that is a command itself: `tah eval MODEL` beside `tah eval compare A B`.

    Its hidden command of the same name gets every command line that does not begin with another of its commands.
    """

    @property
    def default(self) -> Any:
        """The command that the group is."""
        return self.commands[self.name or ""]

    def walk(self, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
        """The visible commands, and the group itself before them."""
        yield " ".join(names), self.default
        yield from super().walk(names)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the default command before its arguments, unless they begin with a mistyped command."""
        if args and args[0] not in self.commands and self.is_mistyped(args[0]):
            ctx.fail(words.unknown("command", args[0], self.visible()))
        if not args or args[0] not in self.commands or args[0] == self.name:
            end = args.index("--") if "--" in args else len(args)
            asks = set(ctx.help_option_names) & set(args[:end])
            args = ["--help"] if asks else [self.name or "", *args]
        return super().parse_args(ctx, args)

    def is_mistyped(self, word: str) -> bool:
        """Whether it looks like one of the commands, and not like an option or a model."""
        is_other = word.startswith("-") or word in words.MODELS or "/" in word or os.path.exists(word)
        return not is_other and words.nearest(word, self.visible()) is not None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the default command, then the other commands."""
        own = type(ctx)(self.default, info_name=ctx.info_name, parent=ctx.parent)
        self.default.format_help(own, formatter)
        self.format_commands(ctx, formatter)

    def get_short_help_str(self, limit: int = 45) -> str:
        """The line of the default command in the list of commands, with the names of the others."""
        line: str = self.default.get_short_help_str(limit)
        return f"{line.removesuffix('.')}; also {', '.join(self.visible())}."
