"""Child processes, gone when their parent is gone; those of the testbed take and give lines.

A testbed child's stdin is a pipe that only this process writes to, so it reads the end of the file
when this process ends, however that happens; both kinds of child exit on it. Processes of
`multiprocessing` call `end_with_parent`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from executor.errors import ConfigError, HandshakeError

__all__ = ["Child", "end_with_parent"]

STDERR_TAIL_BYTES = 8192
GRACE_S = 3.0


class Child:
    """`python -m MODULE ARGS...` with piped stdin and stdout; stderr goes to a hidden file."""

    def __init__(self, name: str, module: str, args: Sequence[str] = ()) -> None:
        """Start the process.

        Args:
            name: What to call it in errors.
            module: Dotted module to run.
            args: Its command line arguments.
        """
        self.name = name
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self._unread = b""
        self._last_words = ""
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
            bufsize=0,
            start_new_session=True,  # Ctrl-C goes to the parent, which ends its children in order
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process is still running."""
        return self._process.poll() is None

    def stderr_tail(self) -> str:
        """The last of what the process wrote to stderr; also after `close`."""
        if self._stderr.closed:
            return self._last_words
        size = os.fstat(self._stderr.fileno()).st_size
        # pread leaves the file offset alone, which the child shares.
        start = max(0, size - STDERR_TAIL_BYTES)
        tail = os.pread(self._stderr.fileno(), STDERR_TAIL_BYTES, start)
        return tail.decode(errors="replace").strip()

    def send(self, message: dict[str, Any]) -> None:
        """Write one JSON line to the process.

        Raises:
            HandshakeError: The process has ended.
        """
        data = memoryview(json.dumps(message).encode() + b"\n")
        assert self._process.stdin is not None
        try:
            while data:
                data = data[self._process.stdin.write(data) :]
        except (BrokenPipeError, ValueError) as error:
            raise HandshakeError(f"{self._ending()}; start a new testbed") from error

    def read_line(self, timeout_s: float) -> str:
        """Read one line that the process prints.

        Raises:
            ConfigError: The process refused its settings (exit code 2); carries its own words.
            HandshakeError: It ended otherwise, or printed nothing in time.
        """
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = max(0.0, deadline_s - time.monotonic())
            if not select.select([self._process.stdout], [], [], left_s)[0]:
                raise HandshakeError(
                    f"{self.name} said nothing for {timeout_s:g} s after its start; "
                    f"stderr: {_last_line(self.stderr_tail())}"
                )
            data = os.read(self._process.stdout.fileno(), 4096)
            if not data:
                try:
                    self._process.wait(GRACE_S)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
                if self._process.returncode == 2:
                    raise ConfigError(_last_line(self.stderr_tail()))
                raise HandshakeError(self._ending())
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace").strip()

    def _ending(self) -> str:
        code = self._process.poll()
        state = "has closed its stdin" if code is None else f"ended with code {code}"
        return f"{self.name} {state}; stderr: {_last_line(self.stderr_tail())}"

    def end_input(self) -> None:
        """Close the process's stdin, which asks it to end."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()

    def signal(self, number: int) -> None:
        """Send the process a signal, if it has not ended."""
        self._process.send_signal(number)

    def limit_files(self, n_bytes: int) -> None:
        """Let no file of the process grow past `n_bytes`, as on a full disk; -1 lifts the limit."""
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (n_bytes if n_bytes >= 0 else hard, hard))

    def kill(self) -> None:
        """End the process at once (SIGKILL) and wait for it."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ask the process to end, then make it; release the pipes. May be called again."""
        self.end_input()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            try:
                self._process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._last_words = self.stderr_tail()
        self._stderr.close()


def end_with_parent() -> None:
    """Let this process of `multiprocessing` end as soon as its parent has, however that happens.

    One of a pool would wait for work for ever: it holds the writing end of its queue itself, and so
    never reads that the other side is gone.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="end-with-parent", daemon=True).start()


def _last_line(text: str) -> str:
    return text.splitlines()[-1] if text else "(empty)"
