"""How long a newcomer waits: `hilum --help` and `import hilum`, as whole processes, beside a bare interpreter."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 9


def seconds(command: list[str]) -> float:
    """Median wall seconds of a whole process, after one warm-up."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> dict[str, float]:
    python = sys.executable
    rows = {
        "python -c pass": seconds([python, "-c", "pass"]),
        "import hilum": seconds([python, "-c", "import hilum"]),
        "hilum --help": seconds([str(Path(python).with_name("hilum")), "--help"]),
    }
    for name, value in rows.items():
        print(f"{name:20} {value:6.3f} s  {value / rows['python -c pass']:5.1f}x the interpreter")
    return rows


if __name__ == "__main__":
    main()
