"""Processes that a program starts to share its work: they end when it ends, however it ends."""

import os
import threading
from multiprocessing import connection, parent_process


def end_with_parent() -> None:
    """Have this process end when the one that started it is gone; for initializers of process pools.

    A process of a pool whose parent was killed would wait for work for ever.
    """
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
