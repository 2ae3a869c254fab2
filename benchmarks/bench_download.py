"""Pictures a second that `download` fetches, decodes, shrinks and keeps, from a local server; and its memory.

The server (tests/picture_server.py) answers from memory with JPEGs of 500 x 375 pixels, as bench_loader.py makes them,
under 50 host names, so that most requests need a new connection, as on the web. There is no wait between two requests
to a host. This measures the processor's work for each picture, which limits the rate on any network. The second part
measures memory over many rows that need no request.

    python benchmarks/bench_download.py [--pictures 10000] [--rows 200000] [--out build/bench/download.json]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import bench_loader
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import picture_server

from clipid_utils.data.download.addresses import PublicNetwork
from clipid_utils.data.download.download import download
from clipid_utils.data.download.fetcher import Limits

DIFFERENT = 50  # pictures


def serve() -> None:
    """Prints its port, and serves until standard input ends."""
    files = [bench_loader.photograph(number) for number in range(DIFFERENT)]
    picture_server.KINDS["photograph"] = (
        "kept", None, lambda n, asked: picture_server.reply(files[n % DIFFERENT] + n.to_bytes(4)))
    with picture_server.PictureServer() as server:
        print(server.port, flush=True)
        sys.stdin.read()


def measure(urls: Iterator[str], count: int) -> dict:
    """Rate and memory, half-way and at the end, of a download of `count` URLs into a temporary folder."""
    process, memory = psutil.Process(), []

    def rows() -> Iterator[dict]:
        for row, url in enumerate(urls):
            if row in (count // 2, count - 1):
                memory.append(round(process.memory_info().rss / 2**20))
            yield {"url": url, "captions": ["gambar"], "source": None, "split": None, "row": row}

    with tempfile.TemporaryDirectory() as folder:
        start, processor = time.perf_counter(), sum(process.cpu_times()[:2])
        report = download(rows(), folder, limits=Limits(interval=0.0), total=count,
                          network=PublicNetwork(picture_server.resolve, picture_server.Near()))
        seconds = time.perf_counter() - start
    return {"rows": report.read, "kept": report.kept, "a_second": round(count / seconds, 1),
            "processor_ms": round((sum(process.cpu_times()[:2]) - processor) / count * 1000, 2),
            "mib_half_way": memory[0], "mib_at_the_end": memory[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=Path("build/bench/download.json"))
    options = parser.parse_args()
    if options.serve:
        return serve()
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True)
    try:
        port = int(server.stdout.readline())
        report = {
            "pictures": measure((f"http://h{number % 50}.test:{port}/photograph/{number}"
                                 for number in range(options.pictures)), options.pictures),
            "rows without a request": measure((f"ftp://a.test/{number}" for number in range(options.rows)),
                                              options.rows),
        }
    finally:
        server.kill()
    print(json.dumps(report, indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
