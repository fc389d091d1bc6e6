"""Watches an Orthanc, has every finished chest radiograph study read by Hilum, and sends the reports back into it.

    python orthanc_watch.py http://localhost:8042 MODEL

Standard library alone, and only the REST interface of Orthanc: nothing is loaded into Orthanc, and no plugin is needed.
A study is read when Orthanc calls it stable, and again when images are added to it. Which images were read is kept as
metadata of the study, so that the reports, which are new instances themselves, start nothing. A study that fails is
tried again, three times. Images lie in a temporary folder while they are read (TMPDIR may be a memory disk), and are
removed; nothing of a patient is printed. User and password of Orthanc: ORTHANC_USER and ORTHANC_PASSWORD.

Research use only; not a medical device. Not for diagnosis, triage or patient management.
"""

import argparse
import base64
import csv
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

MODALITIES = ("CR", "DX", "RG")
METADATA = "4837"
"""Of a study: which images were read, by which model. From 1024 on numbers are free for users of Orthanc."""
TRIES = 3


class NoReportError(Exception):
    """A study was read, and no report of it could be made; says why in words that hold nothing of a patient."""


class Orthanc:
    """Its REST interface, as far as it is needed."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        user, password = os.environ.get("ORTHANC_USER"), os.environ.get("ORTHANC_PASSWORD", "")
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        self.headers = {"Authorization": f"Basic {token}"} if user else {}

    def ask(self, path: str, body: bytes | None = None, method: str | None = None) -> bytes:
        """The answer to a request; OSError where there is none."""
        request = urllib.request.Request(f"{self.address}{path}", data=body, headers=self.headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def changes(self, since: int) -> dict:
        """What has happened after a number of its."""
        return json.loads(self.ask(f"/changes?since={since}&limit=100"))

    def radiographs(self, study: str) -> list[str]:
        """Images of a study that may be chest radiographs."""
        series = json.loads(self.ask(f"/studies/{study}/series"))
        chosen = [one for one in series if one["MainDicomTags"].get("Modality") in MODALITIES]
        return sorted(instance for one in chosen for instance in one["Instances"])

    def read_by(self, study: str) -> str:
        """What `mark` has kept; "" where nothing is."""
        try:
            return self.ask(f"/studies/{study}/metadata/{METADATA}").decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return ""
            raise

    def mark(self, study: str, images: str) -> None:
        """Keep which images were read."""
        self.ask(f"/studies/{study}/metadata/{METADATA}", images.encode(), "PUT")


def read_study(orthanc: Orthanc, study: str, model: str, command: list[str], captures: str) -> int:
    """Have a study read and its reports stored; how many objects were stored, 0 where there is nothing to do."""
    images = orthanc.radiographs(study)
    identity = hashlib.sha256("\n".join([model, *images]).encode()).hexdigest()
    if not images or orthanc.read_by(study) == identity:
        return 0
    with tempfile.TemporaryDirectory(prefix="hilum-") as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for number, image in enumerate(images):
            (folder / "images" / f"{number}.dcm").write_bytes(orthanc.ask(f"/instances/{image}/file"))
        options = ["--out", str(folder / "findings.json"), "--reports", str(folder / "reports")]
        options += ["--formats", "sr,sc", "--captures", captures]
        asked = [*command, "predict", model, str(folder / "images"), *options]
        done = subprocess.run(asked, check=False, capture_output=True)
        read = [json.loads(path.read_text())["status"] for path in (folder / "reports").rglob("study.json")]
        if done.returncode and not (read and set(read) == {"withheld"}):  # no chest: an answer, and no failure
            raise subprocess.CalledProcessError(done.returncode, "hilum predict")
        objects = sorted((folder / "reports").rglob("*.dcm"))
        if "scored" in read and not objects:
            with (folder / "reports" / "not_written.csv").open(newline="") as file:
                raise NoReportError(", ".join(sorted({row["reason"] for row in csv.DictReader(file)})))
        for path in objects:
            orthanc.ask("/instances", path.read_bytes(), "POST")
    orthanc.mark(study, identity)
    return len(objects)


def watch(orthanc: Orthanc, state: Path, model: str, command: list[str], captures: str) -> int:
    """Go through everything that is new; how many changes that was."""
    known = json.loads(state.read_text()) if state.exists() else {"last": 0, "failed": {}}
    answer = orthanc.changes(known["last"])
    stable = [one["ID"] for one in answer["Changes"] if one["ChangeType"] == "StableStudy"]
    for study in dict.fromkeys([*known["failed"], *stable]):
        try:
            stored = read_study(orthanc, study, model, command, captures)
            known["failed"].pop(study, None)
            if stored:
                print(f"{study}: {stored} objects stored", flush=True)
        except (OSError, subprocess.CalledProcessError, NoReportError) as error:
            why = f" ({error})" if isinstance(error, NoReportError) else ""
            count = known["failed"].get(study, 0) + 1
            known["failed"][study] = count
            print(f"{study}: {type(error).__name__}{why}, attempt {count} of {TRIES}", file=sys.stderr, flush=True)
            if count >= TRIES:
                known["failed"].pop(study)
    known["last"] = answer["Last"]
    temporary = state.with_name(state.name + ".tmp")
    temporary.write_text(json.dumps(known))
    temporary.replace(state)
    return len(answer["Changes"])


def main() -> None:
    """Watch until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("orthanc", help="its address, such as http://localhost:8042")
    parser.add_argument("model", help="a model or an ensemble")
    parser.add_argument("--hilum", default="hilum", help="the command, with its first arguments")
    parser.add_argument("--captures", default="above", help="above or all: of which findings pictures are sent")
    parser.add_argument("--state", default="orthanc_watch.json", help="what was seen, so that a restart goes on")
    parser.add_argument("--once", action="store_true", help="stop when there is nothing new")
    parser.add_argument("--seconds", type=float, default=10.0, help="between looks")
    given = parser.parse_args()
    orthanc = Orthanc(given.orthanc)
    while True:
        try:
            new = watch(orthanc, Path(given.state), given.model, shlex.split(given.hilum), given.captures)
        except OSError as error:  # Orthanc is not there: it may come back
            print(f"{given.orthanc}: {type(error).__name__}", file=sys.stderr, flush=True)
            new = 0
        if new == 0:
            if given.once:
                return
            time.sleep(given.seconds)


if __name__ == "__main__":
    main()
