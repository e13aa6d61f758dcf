"""The test's side of `pipeline_cases.py`: starts the ranks of a plan, signals them, and tells how each has ended."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

CASES = Path(__file__).with_name("pipeline_cases.py")
PATIENCE = 60.0


class Nursery:
    """One process from which ranks are forked, one plan at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(CASES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.line() == b"ready\n"

    def start(self, **plan: Any) -> Run:
        """Start a plan: `size` ranks, `out` before the names of its files."""
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(plan) + "\n").encode())
        self._process.stdin.flush()
        return Run(self, json.loads(self.line()), plan)

    def run(self, **plan: Any) -> list[dict[str, Any]]:
        """The results of a plan that must end well."""
        run = self.start(**plan)
        run.wait()
        assert run.codes == dict.fromkeys(range(plan["size"]), 0), run.logs()
        return run.results()

    def line(self, timeout: float = PATIENCE) -> bytes:
        """What the process says next."""
        return self._lines.get(timeout=timeout)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10.0)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(5.0)
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)


class Run:
    """The ranks of one plan."""

    def __init__(self, nursery: Nursery, pids: list[int], plan: dict[str, Any]) -> None:
        self.pids, self.plan = pids, plan
        self.codes: dict[int, int] = {}
        """How ranks have ended, in the order in which they did."""
        self.seconds: dict[int, float] = {}
        """When, since the start."""
        self._nursery, self._began = nursery, time.monotonic()

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank, unless it has just ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def wait(self, *ranks: int, timeout: float = PATIENCE) -> None:
        """Until some ranks have ended, all by default; whoever is left after `timeout` s is killed, and the test fails."""
        end = time.monotonic() + timeout
        try:
            while not set(ranks or range(len(self.pids))) <= set(self.codes):
                rank, code = json.loads(self._nursery.line(max(0.0, end - time.monotonic())))
                self.codes[rank], self.seconds[rank] = code, time.monotonic() - self._began
        except queue.Empty:
            left = [rank for rank in range(len(self.pids)) if rank not in self.codes]
            self.kill_all()
            raise AssertionError(f"ranks {left} have not ended after {timeout} s:\n{self.logs()}") from None

    def kill_all(self) -> None:
        """End what has not ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        while len(self.codes) < len(self.pids):
            rank, code = json.loads(self._nursery.line(10.0))
            self.codes[rank] = code

    def wait_for(self, path: Path, timeout: float = PATIENCE) -> None:
        """Until a file is there."""
        end = time.monotonic() + timeout
        while not path.exists():
            if time.monotonic() > end:
                self.kill_all()
                raise AssertionError(f"{path.name} did not come:\n{self.logs()}")
            time.sleep(0.002)

    def log(self, rank: int) -> str:
        """What a rank has written."""
        path = Path(f"{self.plan['out']}.{rank}.log")
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        """What all have written."""
        return "\n".join(f"--- rank {rank}: {self.codes.get(rank)}\n{self.log(rank)[-3000:]}" for rank in range(len(self.pids)))

    def results(self) -> list[dict[str, Any]]:
        """What rank 0 has found."""
        return json.loads(Path(f"{self.plan['out']}.json").read_text())
