"""The line in which studies wait: a few places, one thread that decodes, one that runs the model.

What is sent twice is done once. A client that goes away takes its study out of the line, unless another waits for the
same. Nothing here knows of HTTP but the refusal of a full line.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from hilum.deploy.server.decoding import Decoder, Picture
from hilum.deploy.server.errors import busy
from hilum.deploy.server.results import Study

T = TypeVar("T")
_FORGETTING = 0.8
"""Weight of the past in the mean time that a study takes."""


@dataclass
class Job:
    """A study in the line."""

    files: list[bytes]
    views: Sequence[str]
    digest: bytes
    waiting: int = 0
    """Clients that want it; at none it is dropped before its next step."""
    milliseconds: dict[str, int] = field(default_factory=dict)
    task: "asyncio.Task[Study] | None" = None
    taken: bool = False
    """A client has the study under its name; any other gets it under one of its own."""


class Line:
    """Studies that wait or are worked on.

    Args:
        decoder: what reads files.
        accept: asked after each picture of a study; raises where the next one must not be read.
        judge: from pictures and a job to a study; runs in the model's one thread.
        places: how many studies at once.
    """

    def __init__(
        self,
        decoder: Decoder,
        accept: Callable[[list[Picture]], None],
        judge: Callable[[list[Picture], Job], Study],
        places: int,
    ) -> None:
        self.decoder, self.accept, self.judge, self.places = decoder, accept, judge, places
        self.jobs: dict[bytes, Job] = {}
        self.seconds = 1.0
        """A study takes, in the mean of late."""
        self._decoding = ThreadPoolExecutor(1, "decode")
        self._model = ThreadPoolExecutor(1, "model")

    def check(self) -> None:
        """Refuse early, before a body is read.

        Raises:
            RefusedError: 503; every place is taken.
        """
        if len(self.jobs) >= self.places:
            raise busy("busy", "The server has as much to do as it takes on. Try again.", self.places * self.seconds)

    async def study(self, files: list[bytes], views: Sequence[str], digest: bytes) -> tuple[Study, dict[str, int]]:
        """Take a place in the line, and wait for the study; cancelled, it gives its place up.

        Returns:
            the study, under a name that nobody else has, and the milliseconds that its steps took.

        Raises:
            RefusedError: 503 no place; 413, 422 an image cannot be used; 500 the model gives no numbers.
        """
        job = self.jobs.get(digest)
        if job is None:
            self.check()
            job = Job(files, views, digest)
            job.task = asyncio.create_task(self._work(job))
            self.jobs[digest] = job
            # Also where its task is cancelled before it begins; and an error that nobody waits for is no news.
            job.task.add_done_callback(lambda task: self._leave(job, task))
        assert job.task is not None, "every job in the line has one"
        job.waiting += 1
        try:
            study = await asyncio.shield(job.task)
            study, job.taken = study.renamed() if job.taken else study, True
            return study, job.milliseconds
        finally:
            job.waiting -= 1
            if job.waiting == 0 and not job.task.done():
                self._forget(job)  # at once, so that the same upload, sent again now, does not join what is given up
                job.task.cancel()

    async def in_model_thread(self, call: Callable[[], T]) -> T:
        """Run something else that needs the model, behind what it does now."""
        return await asyncio.get_running_loop().run_in_executor(self._model, call)

    def close(self) -> None:
        """End the threads, after what they do now, and the decoding process."""
        self._decoding.shutdown(cancel_futures=True)
        self._model.shutdown(cancel_futures=True)
        self.decoder.close()

    async def _work(self, job: Job) -> Study:
        loop, start = asyncio.get_running_loop(), time.monotonic()
        pictures: list[Picture] = []
        for number, content in enumerate(job.files, 1):
            pictures.append(await loop.run_in_executor(self._decoding, self.decoder.decode, content, number))
            self.accept(pictures)
        job.files = []  # their pixels are enough
        decoded = time.monotonic()
        study = await loop.run_in_executor(self._model, self.judge, pictures, job)
        ended = time.monotonic()
        job.milliseconds = {"decode_ms": round(1000 * (decoded - start)), "model_ms": round(1000 * (ended - decoded))}
        return study

    def _forget(self, job: Job) -> None:
        if self.jobs.get(job.digest) is job:
            del self.jobs[job.digest]

    def _leave(self, job: Job, task: "asyncio.Task[Study]") -> None:
        self._forget(job)
        if task.cancelled() or task.exception() is not None:
            return
        took = sum(job.milliseconds.values()) / 1000 / (len(self.jobs) + 1)
        self.seconds = _FORGETTING * self.seconds + (1 - _FORGETTING) * took
