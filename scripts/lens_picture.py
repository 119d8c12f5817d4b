"""Write docs/images/lens.png: the depth lens of the bundled `follow-tah` on its problems. Needs chromium."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tah.load import FOLLOW
from tah_cli.app import run

TARGET = Path(__file__).parents[1] / "docs" / "images" / "lens.png"


def main() -> None:
    """Trace the model, make the report, and take a picture of it with a corrected token selected."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        os.chdir(directory)  # the page contains the path of the data as it was given
        shutil.copy(FOLLOW / "problems.jsonl", "problems.jsonl")
        assert run(["trace", "follow-tah", "problems.jsonl", "-o", "trace.jsonl"]) == 0
        assert run(["report", "trace.jsonl", "-o", "lens.html"]) == 0
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": 1280, "height": 800})
        page.goto(Path("lens.html").resolve().as_uri())
        page.locator(".row .t.c").first.click()
        page.screenshot(path=str(TARGET))
        opened.close()


if __name__ == "__main__":
    main()
