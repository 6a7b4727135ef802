"""The page of ``dnp serve`` as a picture, with one round on it.

python benchmarks/page.py docs/images/page.png
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from playwright.sync_api import expect, sync_playwright

PROMPT = "a large red circle left of a small blue square on a plain yellow background"
EDITED = "a large blue circle on a plain white background"


@click.command()
@click.argument("out", type=click.Path(path_type=Path), default=Path("out/page.png"))
@click.option("--seed", type=int, default=3, show_default=True)
def main(out: Path, seed: int) -> None:
    """Write what chromium shows of a round, and of an n* written by hand after it, to OUT."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise click.ClickException("there is no chromium here; install it")
    with server() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.get_by_label("Prompt p").fill(PROMPT)
        page.locator("#set-seed").fill(str(seed))
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#phase")).to_have_text("Done.", timeout=120_000)
        page.locator("#negative-0").fill(EDITED)
        page.locator("#negative-0").press("Enter")
        expect(page.locator(".takes li")).to_have_count(2, timeout=120_000)
        page.mouse.move(0, 0)
        page.screenshot(path=out)
        browser.close()


@contextmanager
def server() -> Iterator[str]:
    """The address of a server of its own."""
    command = [sys.executable, "-m", "dnp", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = (re.search(r"ready: open (http\S+)", line) for line in process.stdout)
            yield next(match[1] for match in found if match)
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
