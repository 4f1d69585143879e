"""Plugin of pytest for bench/gpu.sh: -p outcomes_plugin --outcomes FILE [--share 2/8].

Writes a line for each test as it begins and as it ends: what a process that dies has done is known, and in
which test it died. Begun again with the same file, it goes on behind that test.

A kernel that reaches outside of its memory takes the whole CUDA context with it: every later test of the
process would fail. So each test waits for the GPU, or another would be blamed, and where the context is
lost the session ends.
"""

import faulthandler
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

STDERR = os.fdopen(os.dup(2), "w")  # before pytest puts another in its place
LONGEST = 4000  # characters kept of a failure: its beginning and its end


class Outcomes:
    def __init__(self, path: Path) -> None:
        self.path, self.reports, self.begun = path, [], set()
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with suppress(ValueError):  # the last line of a process that was killed
                self.begun.add(json.loads(line)["test"])

    def write(self, **line) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_modifyitems(self, config, items) -> None:
        number, of = map(int, config.getoption("--share").split("/"))
        kept = [item for item in items[number - 1 :: of] if item.nodeid not in self.begun]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.end(report.nodeid or "collection", [report])

    def pytest_runtest_logstart(self, nodeid) -> None:
        self.reports = []
        self.write(test=nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self):
        result = yield
        wait_for_gpu()
        return result

    def pytest_runtest_logreport(self, report) -> None:
        self.reports.append(report)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        result = yield
        self.end(item.nodeid, self.reports)
        try:
            wait_for_gpu()
        except Exception as error:
            item.session.shouldstop = f"the GPU is lost to this process: {error}"
        return result

    def end(self, nodeid, reports) -> None:
        failed = [report for report in reports if report.failed]
        skipped = any(report.skipped for report in reports)
        self.write(
            test=nodeid,
            outcome="failed" if failed else "skipped" if skipped else "passed",
            seconds=sum(getattr(report, "duration", 0.0) for report in reports),
            text=shortened("\n".join(str(report.longrepr) for report in failed)),
            brief=brief(failed[0]) if failed else "",
        )


def wait_for_gpu() -> None:
    """Raises what a kernel has done wrong, which no call has been told yet."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def shortened(text: str) -> str:
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}\n[...]\n{text[-half:]}"


def brief(report) -> str:
    """What was raised, in a line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return next((line.strip()[:200] for line in text.splitlines() if line.strip()), "")


def pytest_addoption(parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file for a line for each test")
    parser.addoption("--share", default="1/1", help="number and count: which of the tests are run")


def pytest_configure(config) -> None:
    if path := config.getoption("--outcomes"):
        # Of Ctrl-C pytest shows the last line alone: here is how it came there.
        faulthandler.register(signal.SIGINT, STDERR, all_threads=True, chain=True)
        config.pluginmanager.register(Outcomes(path))
