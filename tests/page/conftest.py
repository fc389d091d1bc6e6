"""A real browser before the page: the system's Chromium, headless."""

import shutil
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("starlette", reason="the extra hilum[serve] is not installed")

from playwright.sync_api import Browser, BrowserContext, sync_playwright
from reading import Reader, new_reader
from stand_in import StandIn, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")  # not the session's: while playwright is open, its event loop runs in this thread
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking"]  # containers have no user namespaces
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture
def server() -> StandIn:
    return StandIn()


@pytest.fixture
def address(server: StandIn) -> Iterator[str]:
    with serving(server.app()) as where:
        yield where


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    opened = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    yield opened
    opened.close()


@pytest.fixture
def reader(context: BrowserContext, server: StandIn, address: str) -> Reader:
    return new_reader(context, server, address).open()
