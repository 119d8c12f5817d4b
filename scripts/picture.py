"""Write docs/images/generate.svg: an answer of the bundled checkpoint smollm2-tah in the colours of `tah generate`."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme

from tah.load import quiet
from tah.policy import Rule
from tah.session import Session
from tah_cli.demo import QUESTIONS
from tah_cli.terminal import Painter, summary

TARGET = Path(__file__).parents[1] / "docs" / "images" / "generate.svg"
THEME = TerminalTheme((22, 24, 29), (215, 218, 224), [(0, 0, 0)] + [(190, 190, 190)] * 7, [(110, 115, 125)] * 8)


def main() -> None:
    """Generate the answer and write the picture."""
    quiet()
    console = Console(
        record=True,
        width=96,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
        markup=False,
    )
    session = Session.open("smollm2-tah")
    painter = Painter(console, session.model.config.threshold)
    question = QUESTIONS[0]
    ids = session.encode([{"role": "user", "content": question}])
    answer = session.answer(ids, lambda token: None, Rule(), max_new_tokens=60, do_sample=False)
    console.print(f'$ tah generate smollm2-tah "{question}"', style="bold")
    text = painter.text(answer.tokens)
    text.rstrip()
    console.print(text)
    console.print()
    console.print(painter.legend())
    console.print(summary(len(answer.tokens), answer.seconds, answer.depths), style="dim")
    svg = console.export_svg(title="tah generate", theme=THEME)
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # @font-face loads a font from a CDN
    svg = svg.replace("Fira Code, monospace", "Fira Code, DejaVu Sans Mono, Menlo, Consolas, monospace")
    TARGET.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", "utf-8")


if __name__ == "__main__":
    main()
