"""Pages in a real browser without a network, for tests that skip where there is none."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

#: Chromium from the distribution's packages, by the names that it goes by.
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def opened(
    shown: Any, folder: Path, link: str = "", *, size: tuple[int, int] = (1280, 800), **options: Any
) -> Iterator[Any]:
    """A page (its html, or an atlas) in a browser; what it complains of fails the test at the end."""
    library = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("needs a browser: apt-get install chromium")
    path = folder / "page.html"
    path.write_text(shown if isinstance(shown, str) else shown.page(), encoding="utf-8")
    complaints: list[str] = []
    with library.sync_playwright() as browsers:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = browsers.chromium.launch(executable_path=program, args=arguments)
        try:
            context = browser.new_context(
                offline=True, viewport={"width": size[0], "height": size[1]}, **options
            )
            page = context.new_page()

            def asked(request: Any) -> None:
                if not request.url.startswith(("file:", "data:")):
                    complaints.append(request.url)

            def said(message: Any) -> None:
                if message.type in ("error", "warning"):
                    complaints.append(message.text)

            page.on("console", said)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", asked)
            page.goto(f"{path.as_uri()}{link}")
            page.wait_for_selector("html[data-ready], iframe", timeout=20_000)
            yield page
        finally:
            browser.close()
    assert not complaints


def until(page: Any, condition: str, seconds: float = 20) -> None:
    """Waits for a condition of the page's own; the library's way would evaluate text, which pages forbid.

    Raises:
        TimeoutError: it does not come true.
    """
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        if time.monotonic() > end:
            raise TimeoutError(condition)
        page.wait_for_timeout(20)
