"""`tah chat`: a conversation in the terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from tah.config import check_max_depth, check_threshold
from tah.names import LABEL_FREE, unknown
from tah.policy import Rule
from tah.session import Session

from .terminal import Painter, make_console, summary

FIRST = [{"role": "user", "content": "hello"}]  # the shortest conversation that a chat template must accept
NEEDS = {  # the value of each command, and an example
    "/depth": "an integer >= 1, such as /depth 2",
    "/threshold": "a number from 0 to 1, such as /threshold 0.5",
    "/policy": f"one of {', '.join(LABEL_FREE)}",
}
HELP = """\
/depth N        maximum number of passes per token
/threshold X    take another pass above this continue probability, 0 to 1
/policy NAME    policy: {policies}
/reset          start a new conversation
/quit           quit (also Ctrl-D); Ctrl-C stops an answer"""


class NotANumber(ValueError):
    """The value of a command is not a number."""


def _number(kind: type[int] | type[float], text: str) -> Any:
    try:
        return kind(text)
    except (ValueError, OverflowError) as error:
        raise NotANumber(text) from error


class Chat:
    """A conversation in the terminal: read lines, answer them, keep the messages.

    Args:
        session: Model and tokenizer.
        rule: Completed rule of the first answer; commands change it for later answers.
        sampling: Other options of `Session.answer`.
        system: System message; None or empty for none.
        color: Whether colours mark the depth of tokens; if not, brackets do.

    Raises:
        ValueError: The chat template does not accept a system message.
    """

    def __init__(
        self, session: Session, rule: Rule, sampling: dict[str, Any], system: str | None, *, color: bool
    ) -> None:
        self.session, self.rule, self.sampling = session, rule, sampling
        self.start = [{"role": "system", "content": system}] if system else []
        if self.start:
            session.encode([*self.start, *FIRST])
        self.messages = list(self.start)
        self.console = make_console(color=color)

    def run(self) -> None:
        """Read and answer lines until the user quits."""
        self.console.print(self._painter().legend())
        self.console.print("/help lists the commands", style="dim")
        if not self.session.tokenizer.chat_template:
            self.console.print("the model has no chat template; messages are joined without one", style="dim")
        try:
            import readline  # noqa: F401 - editing and history for input()
        except ImportError:  # Windows has no readline
            pass
        while True:
            try:
                line = input("> ").strip()
                line.encode()
            except EOFError:
                self.console.print()
                return
            except UnicodeError as error:
                raise ValueError("standard input is not UTF-8 text") from error
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self.console.print(self.command(line), style="dim")
            elif line:
                self.turn(line)

    def _painter(self) -> Painter:
        return Painter(self.console, None if self._draws() else cast(float, self.rule.threshold))

    def _draws(self) -> bool:
        return self.rule.draws(self.session.model.config)

    def _set_policy(self, name: str) -> None:
        self.rule = replace(self.rule, policy=name)
        if self._draws():  # a threshold that was set for another policy would be refused
            self.rule = replace(self.rule, threshold=self.session.model.config.threshold)

    def _rule(self) -> str:
        """Return policy, threshold and maximum depth as text."""
        shown = self.rule.arguments()
        if self._draws():
            shown |= {"threshold": "none (decisions are drawn)"}
        return ", ".join(f"{key} {entry}" for key, entry in shown.items())

    def command(self, line: str) -> str:
        """Run a command, a line that starts with a slash, and return the message for the user."""
        name, _, value = line.partition(" ")
        value = value.strip()
        if name in NEEDS and not value:
            return f"{name} needs {NEEDS[name]}"
        try:
            match name:
                case "/help":
                    return HELP.format(policies=", ".join(LABEL_FREE))
                case "/reset":
                    self.messages = list(self.start)
                    return "new conversation"
                case "/depth":
                    check_max_depth(depth := _number(int, value))
                    self.rule = replace(self.rule, max_depth=depth)
                case "/threshold" if self._draws():
                    return "/threshold has no effect: this model draws the decisions of its decider"
                case "/threshold":
                    check_threshold(threshold := _number(float, value))
                    self.rule = replace(self.rule, threshold=threshold)
                case "/policy":
                    if value not in LABEL_FREE:
                        return unknown("policy", value, LABEL_FREE)
                    if value == "decider" and self.session.model.decider is None:
                        return "this model has no decider"
                    self._set_policy(value)
                case _:
                    return f"unknown command {name}; /help lists them"
        except NotANumber:
            return f"{name} {value[:40]}: not a number; {name} needs {NEEDS[name]}"
        except ValueError as error:
            return f"{name} {value}: {error}"
        idle = self.rule.policy == "never" and name in ("/depth", "/threshold")
        hint = "; no token iterates under the policy never; /policy confidence changes the policy" if idle else ""
        return self._rule() + hint

    def turn(self, line: str) -> None:
        """Answer one message. The model does not run again on the part of the prompt that is in the KV cache."""
        if note := self.session.unknown_words(line):
            self.console.print(note, style="dim")
        self.messages.append({"role": "user", "content": line})
        painter = self._painter()
        texts: list[str] = []

        def show(token: Any) -> None:
            painter.show(token)
            texts.append(token.text)

        try:
            answer = self.session.answer(self.session.encode(self.messages), show, self.rule, **self.sampling)
            self.console.print()
            self.console.print(summary(len(answer.tokens), answer.seconds, answer.depths), style="dim")
        except KeyboardInterrupt:
            self.console.print(" [stopped]", style="dim")
        except ValueError as error:  # after an overlong conversation the user can reset, so the program continues
            self.messages.pop()
            self.console.print(f"{error} (/reset starts a new conversation)", style="bold")
            return
        self.messages.append({"role": "assistant", "content": "".join(texts).strip()})
