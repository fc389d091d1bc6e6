import os
import subprocess
import sys
from pathlib import Path

import pytest

from hilum.core.errors import HilumError
from hilum.core.locks import folder_lock


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    program = "\n".join([
        "import sys, time", "from pathlib import Path", "from hilum.core.locks import folder_lock",
        f"with folder_lock(Path({str(tmp_path)!r})):", "    print('held', flush=True)", "    time.sleep(60)",
    ])  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(HilumError, match=f"in use by process {holder.pid}"), folder_lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").read_text().strip() == str(os.getpid())
    with folder_lock(tmp_path):
        pass
