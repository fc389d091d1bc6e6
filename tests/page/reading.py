"""Somebody at the page: what a test can do with it and ask of it, and everything that the page asked for."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, Locator, Page
from stand_in import StandIn, chest, png_bytes


@dataclass
class Watched:
    """What a page asked for and what went wrong in it."""

    requests: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def foreign(self, address: str) -> list[str]:
        """Requests to anywhere but the server; blob: and data: leave no machine."""
        own = urlsplit(address).netloc
        return [
            one for one in self.requests if urlsplit(one).scheme not in ("blob", "data") and urlsplit(one).netloc != own
        ]


@dataclass
class Reader:
    """Somebody at the page."""

    page: Page
    server: StandIn
    address: str
    watched: Watched

    def open(self) -> "Reader":
        self.page.goto(self.address)
        self.page.wait_for_selector("#model:not(:empty)", state="attached")
        return self

    def give(self, *files: dict) -> "Reader":
        """Choose files; two drawn images where none is named."""
        self.page.set_input_files("#files", list(files) or [image_file(1), image_file(2)])
        return self

    def read(self, *files: dict) -> "Reader":
        """Choose files and wait for the findings and the pictures."""
        self.give(*files)
        self.page.wait_for_selector(".row")
        self.page.wait_for_selector("figure.view.blank", state="detached")
        return self

    def choose(self, finding: str) -> "Reader":
        self.row(finding).click()
        self.page.wait_for_selector("figure.view.hot")
        return self

    def row(self, finding: str) -> Locator:
        return self.page.locator(f'[role=option][data-finding="{finding}"]')

    def names(self) -> list[str]:
        """Findings from top to bottom."""
        return self.page.eval_on_selector_all("[role=option]", "rows => rows.map(row => row.dataset.finding)")

    def colours(self, number: int = 1) -> int:
        """Pixels of the canvas that are not grey."""
        return self.page.eval_on_selector(
            f"#image-{number}",
            """canvas => {
              const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              let count = 0;
              for (let at = 0; at < data.length; at += 4) {
                const [red, green, blue] = data.slice(at, at + 3);
                if (Math.max(red, green, blue) - Math.min(red, green, blue) > 12) count += 1;
              }
              return count;
            }""",
        )

    def greys(self, number: int = 1) -> list[int]:
        """Every fourth channel of every 97th pixel of the canvas."""
        return self.page.eval_on_selector(
            f"#image-{number}",
            """canvas => {
              const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              return Array.from({ length: Math.floor(data.length / 388) }, (_, at) => data[388 * at]);
            }""",
        )

    def settle(self) -> None:
        """Wait until what was asked to be drawn has been drawn."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def image_file(seed: int, name: str = "image.png", size: int = 96) -> dict:
    return {"name": name, "mimeType": "image/png", "buffer": png_bytes(chest(size, seed))}


def new_reader(context: BrowserContext, server: StandIn, address: str) -> Reader:
    page, watched = context.new_page(), Watched()
    page.set_default_timeout(15_000)
    page.on("request", lambda request: watched.requests.append(request.url))
    page.on("pageerror", lambda error: watched.troubles.append(str(error)))
    page.on("console", lambda message: watched.troubles.append(message.text) if message.type == "error" else None)
    return Reader(page, server, address, watched)
