"""Measure what a step costs for the record of the run and a webhook, whatever the receiver does.

    python benchmarks/webhooks.py [--steps 200] [--step-time 0.05]

Each step emits a training.status event and a log line, then sleeps. Measured are the seconds in which the step waits
for that, and the processor seconds of all other threads, which may slow a step down where cores are few. The receiver
is a process of its own: it answers, answers late, hangs, fails, closes the connection, or does not exist. "Share" is
the sum of both for a step of 0.2 seconds, far shorter than one of a full-size model.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402
from library.training.events.events import Events  # noqa: E402
from library.training.events.sinks import open_events  # noqa: E402
from library.training.events.webhook_config import Webhook  # noqa: E402
from library.training.saving.state import Progress  # noqa: E402

STEP = 0.2  # seconds, for the share
KINDS = ("none", "answers", "answers after 1 s", "hangs", "fails with 500", "closes the connection", "is not there")

SERVER = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        kind = sys.argv[1]
        if kind == "hangs":
            time.sleep(3600)
        if kind == "closes the connection":
            self.close_connection = True
            return
        if kind == "answers after 1 s":
            time.sleep(1)
        self.send_response(500 if kind == "fails with 500" else 204)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def measure(events: Events, steps: int, step_time: float) -> tuple[list[float], float]:
    """Seconds that each step waits, and processor seconds of other threads per step."""
    waits = []
    process, thread = time.process_time(), time.thread_time()
    for step in range(steps):
        values = {"loss/current": 0.1, "loss/average": 0.1, "lr/unet": 1e-4, "lr/text_encoder": 1e-4}
        began = time.perf_counter()
        events.progress.step = step
        events.emit("training.status", {"epoch": 1, "values": values, "loss": 0.1, "seconds_per_step": step_time})
        events.emit("notification", {"message": f"a line of the log at step {step}"})
        waits.append(time.perf_counter() - began)
        time.sleep(step_time)
    own = time.thread_time() - thread
    return waits, (time.process_time() - process - own) / steps


def run(kind: str, steps: int, step_time: float, folder: Path) -> str:
    """A row of the table."""
    server, webhooks = None, []
    if kind not in ("none", "is not there"):
        server = subprocess.Popen([sys.executable, "-c", SERVER, kind], stdout=subprocess.PIPE, encoding="utf-8")
        assert server.stdout is not None
        webhooks = [Webhook("raw", f"http://127.0.0.1:{int(server.stdout.readline())}/", key=b"key")]
    elif kind == "is not there":
        webhooks = [Webhook("raw", "http://127.0.0.1:9/", key=b"key")]
    start = {"stage": "started", "run": "benchmark", "name": "benchmark"}
    try:
        events = open_events(folder / f"{kind}.jsonl", webhooks, start, Progress(), lambda line: None)
        waits, others = measure(events, steps, step_time)
    finally:
        if server is not None:
            server.terminate()
    median, most = statistics.median(waits), max(waits)
    share = (statistics.mean(waits) + others) / STEP
    return f"| {kind} | {median * 1e6:.0f} | {most * 1e6:.0f} | {others * 1e6:.0f} | {share:.2%} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-time", type=float, default=0.05, help="seconds that a step sleeps")
    arguments = parser.parse_args()
    print(describe())
    print("| receiver | waits, median, µs | longest wait, µs | other threads, µs | share |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            print(run(kind, arguments.steps, arguments.step_time, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
