"""Many drawings at once, in processes of their own: resvg holds Python's lock while it draws, so threads gain little.

The processes are new ones that run `rasterise` as a script. Python's own pools would import a script that has no guard
a second time, or copy a process that JAX's threads run in.
"""

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clipid_utils.data.dictionary import rasterise
from clipid_utils.files import usable_threads

# In a group of their own, so that Ctrl-C is for the one that asked
APART = ({"process_group": 0} if os.name == "posix"
         else {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)})


class Drawers:
    """Up to `count` processes that draw, each started when it is first needed; a context manager that ends them.

    Without a count there is one a core, at most eight.
    """

    def __init__(self, count: int | None = None):
        count = count or usable_threads()
        self.threads, self.idle, self.processes = ThreadPoolExecutor(count), queue.SimpleQueue(), []
        self.starting, self.stopped = threading.Lock(), False
        for _ in range(count):
            self.idle.put(None)

    def __enter__(self) -> "Drawers":
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is not None:
            with self.starting:
                self.stopped = True
            for process in self.processes:  # nobody waits for what they are drawing
                process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            try:
                process.stdin.close()  # at which it ends
            except OSError:  # it is dead, with a question in the pipe
                pass
            process.wait()
            process.stdout.close()

    def map(self, render: str, sources: Iterable[str | Path]) -> Iterator[bytes | ValueError]:
        """What the function `render` of `rasterise` makes of each source, in their order, as PNG.

        Or the ValueError that it raised. What else goes wrong is raised here; RuntimeError names the source at which a
        process died.
        """
        return self.threads.map(lambda source: self._draw(render, source), sources)

    def _draw(self, render: str, source: str | Path) -> bytes | ValueError:
        process, sound = self.idle.get(), False
        try:
            process = process or self._start()
            pickle.dump((render, source), process.stdin)
            process.stdin.flush()
            drawn = pickle.load(process.stdout)
            sound = True
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise RuntimeError(f"{str(source)[:200]}: the process that was to draw it died") from error
        finally:
            if process and not sound:
                process.kill()  # what it answers next would be to another question
            self.idle.put(process if sound else None)
        if isinstance(drawn, Exception) and not isinstance(drawn, ValueError):
            raise drawn
        return drawn

    def _start(self) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in sys.path if path)}
        command = [sys.executable, "-P", rasterise.__file__]  # -P: its neighbours are no modules of their own there
        with self.starting:
            if self.stopped:
                raise RuntimeError("the drawers have been stopped")
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, **APART)
            self.processes.append(process)
        return process
