"""Load on the server: concurrent uploads of different small films, as a program of its own beside `hilum serve`.

    python benchmarks/serving.py                    32 clients, 1,000 requests, a tiny model that it makes itself
    python benchmarks/serving.py --model outputs/demo/linear --clients 8
    python benchmarks/serving.py --minutes 60 --clients 2 --pause 1      a film a second and client, for an hour
    python benchmarks/serving.py --soak 100000      so many small requests by 10 clients, and no film

A client that is refused with 503 waits as long as it is told (at most a second here) and sends its film again. Counted
are the statuses of all answers, the seconds from the last sending of a film to its findings, and the memory of the
server after 50 films (or a twentieth of the time) and after all. Exit status 1 where a goal is missed: no 5xx but 503,
99 of 100 films within 2 s, memory within 5 %.
"""

import argparse
import asyncio
import io
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from hilum.data.phantoms.render import render_study

SECONDS, GROWTH, WARM = 2.0, 0.05, 50


def films(side: int) -> Iterator[bytes]:
    """JPEG of synthetic chests without end; each its own, so that none is known again."""
    rendered = [render_study(seed, 0, 0, ["PA"], {}, [(side, side)])[0].pixels for seed in range(8)]
    for number in count():
        pixels = np.roll(rendered[number % 8], divmod(number // 8, side), axis=(0, 1))
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def until(deadline: float, made: Iterator[bytes]) -> Iterator[bytes]:
    """Films as long as there is time."""
    while time.perf_counter() < deadline:
        yield next(made)


def tiny_model(folder: Path) -> Path:
    """A model of a few thousand numbers, fitted for a moment on noise."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "programs"))
    from fit_stores import DECODER, make_store

    from hilum.backbones.vit import VisionTransformer, ViTConfig
    from hilum.backbones.weights import save_backbone
    from hilum.commands import fit
    from hilum.core.config import override

    make_store(folder / "store")
    backbone = VisionTransformer(ViTConfig(48, 2, 2, patch_size=16, image_size=128, layer_scale=0.5))
    save_backbone(backbone, folder / "run", "hilum-grey-1")
    fit.run(override(DECODER, ["resolution=128"]), folder / "store", folder / "run", folder / "model", device="cpu")
    return folder / "model"


class Client:
    """Sends films one after another over one connection."""

    def __init__(self, port: int, statuses: Counter[int], seconds: list[float]) -> None:
        self.port, self.statuses, self.seconds = port, statuses, seconds

    async def work(self, waiting: Iterator[bytes], pause: float = 0.0) -> None:
        """Take films until there are none, and rest for some seconds after each."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for film in waiting:
            while True:
                start = time.perf_counter()
                try:
                    writer.write(request(film))
                    status, headers = await answer(reader)
                except (ConnectionError, asyncio.IncompleteReadError):
                    status, headers = 0, "connection: close"
                self.statuses[status] += 1
                if status == 200:
                    self.seconds.append(time.perf_counter() - start)
                if "connection: close" in headers.lower():
                    writer.close()
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                if status != 503:
                    break
                await asyncio.sleep(min(1.0, float(re.search(r"(?i)retry-after: (\d+)", headers)[1])))
            await asyncio.sleep(pause)
        writer.close()


def request(film: bytes) -> bytes:
    """An upload, as bytes."""
    boundary = secrets.token_hex(8)
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'.encode()
        + film
        + f"\r\n--{boundary}--\r\n".encode()
    )
    head = (
        "POST /api/studies HTTP/1.1\r\nHost: localhost\r\nX-Hilum: page\r\n"
        f"Content-Type: multipart/form-data; boundary={boundary}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, str]:
    """Status and headers; the body is read and forgotten."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = re.search(r"(?i)content-length: (\d+)", head)
    await reader.readexactly(int(length[1]) if length else 0)
    return int(head.split()[1]), head


def memory(pid: int) -> int:
    """Bytes resident, of the server and the process that decodes."""
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


async def load(
    port: int, pid: int, first: Iterator[bytes], rest: Iterator[bytes], clients: int, pause: float = 0.0
) -> dict[str, object]:
    """What came of two lots of films; memory is compared between their ends, and the first is not timed."""
    statuses: Counter[int] = Counter()
    seconds: list[float] = []
    await asyncio.gather(*(Client(port, statuses, seconds).work(first, pause) for _ in range(clients)))
    early, before, start = memory(pid), len(seconds), time.perf_counter()
    seconds.clear()
    await asyncio.gather(*(Client(port, statuses, seconds).work(rest, pause) for _ in range(clients)))
    took = time.perf_counter() - start
    ordered = np.sort(seconds)
    late = memory(pid)
    return {
        "films": before + len(seconds), "clients": clients, "statuses": dict(sorted(statuses.items())),
        "minutes": round(took / 60, 1), "films_per_second": round(len(seconds) / took, 1),
        "p50_s": round(float(np.quantile(ordered, 0.5)), 3), "p99_s": round(float(np.quantile(ordered, 0.99)), 3),
        "slowest_s": round(float(ordered[-1]), 3), "memory_mb_early": round(early / 2**20),
        "memory_mb_late": round(late / 2**20), "memory_growth": round(late / early - 1, 4),
        "load_of_machine": [round(one, 1) for one in os.getloadavg()],
    }  # fmt: skip


async def trickle(port: int, pid: int, side: int, clients: int, minutes: float, pause: float) -> dict[str, object]:
    """Films at a steady pace for some minutes."""
    start, made = time.perf_counter(), films(side)
    first, rest = (until(start + 60 * minutes * share, made) for share in (0.05, 1.0))
    return await load(port, pid, first, rest, clients, pause)


async def soak(port: int, pid: int, count: int, clients: int = 10) -> dict[str, object]:
    """Small requests: health, metadata, a study that is not there."""
    paths = ("/healthz", "/metadata", f"/api/studies/{'a' * 22}", "/nothing")
    left, statuses = iter(range(count)), Counter[int]()
    seen: list[int] = []

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in left:
            writer.write(f"GET {paths[number % 4]} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            statuses[(await answer(reader))[0]] += 1
            if number == count // 20:
                seen.append(memory(pid))
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    took, late = time.perf_counter() - start, memory(pid)
    return {
        "requests": count, "clients": clients, "statuses": dict(sorted(statuses.items())),
        "requests_per_second": round(count / took), "memory_mb_after_5_percent": round(seen[0] / 2**20),
        "memory_mb_after_all": round(late / 2**20), "memory_growth": round(late / seen[0] - 1, 4),
        "load_of_machine": [round(one, 1) for one in os.getloadavg()],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a MODEL directory; default: a tiny one, made here")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--side", type=int, default=512, help="of the films, pixels")
    parser.add_argument("--queue", type=int, default=8, help="places in line of the server")
    parser.add_argument("--minutes", type=float, default=0.0, help="go on for so long, in place of --requests")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds that a client rests, with --minutes")
    parser.add_argument("--soak", type=int, default=0, help="small requests in place of films")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model or tiny_model(Path(folder))
        command = [str(Path(sys.executable).parent / "hilum"), "serve", str(model), "--port", "0", "--device", "cpu"]
        log = Path(folder) / "log"
        with log.open("wb") as opened:
            child = subprocess.Popen(
                [*command, "--queue", str(asked.queue)], stdout=subprocess.PIPE, stderr=opened, text=True
            )
        assert child.stdout is not None
        try:
            said = next(line for line in child.stdout if "http://" in line)
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", said)[1])
            if asked.soak:
                found = asyncio.run(soak(port, child.pid, asked.soak))
            elif asked.minutes:
                pace = (asked.clients, asked.minutes, asked.pause)
                found = asyncio.run(trickle(port, child.pid, asked.side, *pace))
            else:
                made = list(islice(films(asked.side), asked.requests))
                lots = iter(made[:WARM]), iter(made[WARM:])
                found = asyncio.run(load(port, child.pid, *lots, asked.clients))
        finally:
            child.terminate()
            child.wait(30)
    print(json.dumps(found, indent=1))
    wrong = {status for status in found["statuses"] if status not in (200, 404 if asked.soak else 503)}
    return int(bool(wrong) or found.get("p99_s", 0.0) >= SECONDS or found["memory_growth"] >= GROWTH)


if __name__ == "__main__":
    sys.exit(main())
