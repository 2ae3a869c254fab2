"""Many drawings at once, in processes of their own: resvg holds Python's lock while it draws, so threads gain little.

The processes are new ones that run `rasterise` as a script. Python's own pools would import a script that has no guard
a second time, or copy a process that JAX's threads run in.
"""

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clipid_utils.data import rasterise


class Drawers:
    """Processes that draw, one a core unless `count` says otherwise; a context manager that ends them."""

    def __init__(self, count: int | None = None):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-P", rasterise.__file__]  # -P: its neighbours are no modules of their own there
        self.processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
                          for _ in range(count or min(8, cores))]
        self.idle: queue.SimpleQueue = queue.SimpleQueue()
        for process in self.processes:
            self.idle.put(process)
        self.threads = ThreadPoolExecutor(len(self.processes))

    def __enter__(self) -> "Drawers":
        return self

    def __exit__(self, *error) -> None:
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.stdin.close()  # at which it ends
            process.wait()
            process.stdout.close()

    def map(self, render: str, sources: Iterable[str | Path]) -> Iterator[bytes | ValueError]:
        """What the function `render` of `rasterise` makes of each source, in their order, as PNG.

        Or the ValueError that it raised. What else goes wrong is raised here; RuntimeError names the source at which a
        process died.
        """
        return self.threads.map(lambda source: self._draw(render, source), sources)

    def _draw(self, render: str, source: str | Path) -> bytes | ValueError:
        process = self.idle.get()
        try:
            pickle.dump((render, source), process.stdin)
            process.stdin.flush()
            drawn = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError(f"{str(source)[:200]}: the process that was to draw it died; call again") from error
        finally:
            self.idle.put(process)
        if isinstance(drawn, Exception) and not isinstance(drawn, ValueError):
            raise drawn
        return drawn
