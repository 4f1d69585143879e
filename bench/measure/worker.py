"""Work in a process that can be lost: it may hang in a kernel, or ruin its GPU's context for what follows."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

T = TypeVar("T")
START = 45.0  # seconds that a new process may take until it works: it imports torch and finds the GPU
PATIENCE = 5.0  # seconds for it to end, or to hand over what it has after Ctrl-C


class LostError(Exception):
    """The process took too long, or crashed."""


class WorkError(Exception):
    """What the work raised, as text."""


def direct(work: Callable[..., T], *given: Any) -> T:
    """Calls in this process."""
    return work(*given)


class Worker:
    """Calls functions in a process of its own, one at a time; a process that is lost is replaced."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: the limit of each call."""
        self._seconds = seconds
        self._process: BaseProcess | None = None
        self._link: Connection | None = None

    def call(self, work: Callable[..., T], *given: Any) -> T:
        """What `work(*given)` returns.

        Raises:
            LostError: it took longer than its limit, or its process crashed.
            WorkError: it raised.
            KeyboardInterrupt: the user ended it.
        """
        limit = self._seconds
        if self._process is None:
            self._start()
            limit += START
        assert self._link is not None
        self._link.send((work, given))
        how, value, usable = self._answer(limit)
        if not usable:
            self.close()
        if how == "interrupted":
            raise KeyboardInterrupt
        if how == "raised":
            raise WorkError(value)
        answer: T = value
        return answer

    def close(self) -> None:
        """Ends the process; another call starts a new one."""
        process, self._process = self._process, None
        if process is not None and self._link is not None:
            self._link.close()
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()

    def _start(self) -> None:
        context = get_context("spawn")  # a CUDA context outlives no fork
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._link = ours

    def _answer(self, limit: float) -> tuple[str, Any, bool]:
        assert self._link is not None
        assert self._process is not None
        process = self._process
        try:
            if not self._link.poll(limit):
                self._abort(process)
                raise LostError(f"stopped after {limit:.0f} s: where it was is in the log")
        except KeyboardInterrupt:  # the process got it too, and may have something to hand over
            if not self._link.poll(PATIENCE):
                self._abort(process)
                raise
        try:
            answer: tuple[str, Any, bool] = self._link.recv()
        except EOFError:
            process.join(PATIENCE)
            self.close()
            raise LostError(f"its process crashed, exit status {process.exitcode}") from None
        return answer

    def _abort(self, process: BaseProcess) -> None:
        """Has it write where every thread is, and ends it."""
        if process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGABRT)
        self.close()


def _serve(link: Connection) -> None:
    """Works until the other side closes; tells too whether this process can still be used."""
    faulthandler.enable()
    with suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            work, given = link.recv()
            try:
                how, value = "returned", work(*given)
            except KeyboardInterrupt:
                how, value = "interrupted", None
            except Exception as error:  # of a kernel too
                traceback.print_exc()
                how, value = "raised", f"{type(error).__name__}: {error}"
            sys.stdout.flush()
            link.send((how, value, how != "interrupted" and _has_gpu()))


def _has_gpu() -> bool:
    """Whether a GPU that was used still answers: after an access outside of its memory it does not."""
    import torch

    try:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
    except Exception:
        return False
    return True
