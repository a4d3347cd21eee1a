"""A command in a process of its own that leaves nothing behind, and the child's side of that promise."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

STOP_PATIENCE_S = 10.0
"""Time between SIGTERM and SIGKILL."""
END_GRACE_S = 15.0
"""Time that a process has to end by itself after its standard input has; the reward server takes up to 10 s."""
_LOG_LINES = 20
_LOG_END_BYTES = 64 * 1024


class ChildProcess:
    """A running command whose output goes to a log file and which ends with this process, however that ends.

    It is the leader of a session, and so of a process group, of its own: Ctrl-C does not reach it, and `stop`
    reaches all of the group. Its standard input is one end of a socket pair. The kernel closes the other end with
    this process, and every child that has called `end_with_stdin` ends then, in whatever session it is
    (`accelerate launch` gives each of its workers one). The other way round this end tells `stop` when the last
    process that inherited the socket has gone. (Linux' parent-death signal would fire at the end of the *thread*
    that started the child, which in a worker thread is too early.)
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start `command`; `environment` is the whole of it, this process's own where None.

        Raises `OSError` where the program or the log's folder is not there to be used.
        """
        self.log_path = log_path
        self._cleared = False
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._socket, its_stdin = socket.socketpair()
        with its_stdin, log_path.open("ab") as log:
            self._log_start = self._log_read = log.tell()
            try:
                self._process = subprocess.Popen(
                    list(command),
                    stdin=its_stdin.fileno(),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=pass_fds,
                    start_new_session=True,
                )
            except BaseException:
                self._socket.close()
                raise
        atexit.register(self.stop)

    @property
    def pid(self) -> int:
        """The process's id, which is its group's too."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code (below 0: the signal that ended it), or None while the process runs.

        Once it has ended, what is left of its group is killed.
        """
        code = self._process.poll()
        if code is not None:
            self._clear()
        return code

    def stop(self, patience_s: float = STOP_PATIENCE_S) -> None:
        """End the whole group and wait until it is gone; harmless where nothing runs.

        The process itself gets SIGTERM and `patience_s` to end its own children; then the whole group gets SIGKILL.
        Processes that it has put into other sessions end with their standard input.
        """
        if self.poll() is None:
            self._signal_group(signal.SIGTERM)
            try:
                self._process.wait(timeout=patience_s)
            except subprocess.TimeoutExpired:
                logger.warning("Process %d did not end within %g s and is killed", self.pid, patience_s)
                self._signal_group(signal.SIGKILL)
                self._process.wait()
            self._clear()
        self._wait_until_gone()

    def log_end(self, lines: int = _LOG_LINES) -> str:
        """Return the last lines of what this process wrote, to stand behind the message of an error."""
        return end_of_log(self.log_path, since=self._log_start, lines=lines)

    def new_lines(self) -> list[str]:
        """Return the lines that came to the log since the last call; one that is being written waits for its end."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_read)
            written = log.read()
        whole = len(written) if self._cleared else written.rfind(b"\n") + 1
        self._log_read += whole
        # Of a progress bar, which draws over itself, the last state counts.
        lines = (line.rpartition("\r")[2].rstrip() for line in written[:whole].decode("utf-8", "replace").split("\n"))
        return [line for line in lines if line]

    def _clear(self) -> None:
        """After the process has ended: kill the rest of its group and end the standard input of all others."""
        if self._cleared:
            # Its id may be another process's by now.
            return
        self._cleared = True
        atexit.unregister(self.stop)
        self._signal_group(signal.SIGKILL)
        with contextlib.suppress(OSError):  # nobody is left at the other end
            self._socket.shutdown(socket.SHUT_WR)

    def _signal_group(self, number: signal.Signals) -> None:
        # macOS answers with PermissionError where only zombies are left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _wait_until_gone(self) -> None:
        """Wait until nobody holds the other end of the socket, and close this one."""
        with self._socket:
            try:
                self._socket.settimeout(END_GRACE_S + STOP_PATIENCE_S)
                while self._socket.recv(1024):
                    pass
            except TimeoutError:
                logger.warning("Process %d has ended, but not all that it had started; see %s", self.pid, self.log_path)
            except OSError:
                pass  # closed by an earlier call, or reset by a child that left it unread


def end_of_log(path: Path, *, since: int = 0, lines: int = _LOG_LINES) -> str:
    """Return the last lines of a log from byte `since` on, to stand behind the message of an error."""
    try:
        with path.open("rb") as log:
            log.seek(max(since, log.seek(0, os.SEEK_END) - _LOG_END_BYTES))
            written = log.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        return f" Its log {path} cannot be read: {error}"
    if not written:
        return f" It wrote nothing to {path}."
    return "\n".join(["", f"The end of {path}:", *written[-lines:]])


def end_with_stdin(grace_s: float = END_GRACE_S) -> None:
    """End this process when its standard input ends: the process that started it has died, or wants it gone.

    It gets SIGTERM, and where it is still there `grace_s` later it writes to standard error what each of its
    threads was doing and ends with exit code 1, without any cleaning up.
    """
    threading.Thread(target=_watch_stdin, args=(grace_s,), name="stdin", daemon=True).start()


def _watch_stdin(grace_s: float) -> None:
    with contextlib.suppress(OSError):  # a reset is an end too
        while os.read(0, 1024):
            pass
    # A thread of faulthandler's own, which needs nothing of the interpreter.
    faulthandler.dump_traceback_later(grace_s, exit=True, file=2)
    # To the main thread, where Python runs handlers: in another one the signal would not wake it from a wait.
    main = threading.main_thread().ident
    assert main is not None, "the main thread has been started"
    signal.pthread_kill(main, signal.SIGTERM)
