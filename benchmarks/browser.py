"""Debian's Chromium, driven by Playwright; it can reach only this machine."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

CHROMIUM = shutil.which("chromium")
MISSING = "there is no Chromium; install it with: apt-get install chromium"
ONLY_LOOPBACK = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield a headless browser. Its sandbox is off, because it does not work for root."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[ONLY_LOOPBACK])
        try:
            yield browser
        finally:
            browser.close()
