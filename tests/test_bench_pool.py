"""Commands side by side: limits, crashes, order; with commands that stand in for tests on a GPU."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fusedcalib.bench.repository import pool
from fusedcalib.bench.repository.pool import Job

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
FAR = 60.0


def python(code, name="", seconds=FAR, **variables):
    return Job(name or code, (sys.executable, "-X", "faulthandler", "-S", "-c", code), seconds, variables)


def run(*jobs, workers=4, seconds=FAR, then=lambda ended: (), **options):
    """What ended, in that order, and what was not begun."""
    found = []

    def ended(one):
        found.append(one)
        return then(one)

    left = pool.run(jobs, workers, time.monotonic() + seconds, ended, pause=0.01, **options)
    return found, left


@pytest.fixture
def hurried(monkeypatch):
    """Signals follow each other at once."""
    stages = tuple((name, 0.3) for name, _ in pool.STAGES)
    monkeypatch.setattr(pool, "STAGES", stages)


def test_one_that_crashes_costs_itself_only():
    crash = python("import os; print('so far', flush=True); os.kill(os.getpid(), 11)", "crash")
    found, left = run(crash, python("print(1)"), python("raise SystemExit(3)"))
    by_name = {one.job.name: one for one in found}
    assert by_name["crash"].how == "crashed: SIGSEGV"
    assert by_name["crash"].output.startswith("so far\nFatal Python error: Segmentation fault")
    assert (by_name["print(1)"].how, by_name["print(1)"].output) == ("", "1\n")
    assert by_name["raise SystemExit(3)"].how == "exit status 3"
    assert left == []


def test_a_command_that_is_not_there_costs_itself_only(tmp_path):
    (missing, one), _ = run(Job("tool", (str(tmp_path / "tool"),), FAR), python("print(1)"), workers=1)
    assert missing.how == "exit status 127"
    assert "No such file" in missing.output
    assert one.output == "1\n"


def test_jobs_begin_in_their_order_and_no_more_than_so_many_run():
    """Each writes when it begins and ends: with two workers no third begins before one has ended."""
    stamp = "import time; print(time.time()); time.sleep(0.1); print(time.time())"
    found, _ = run(*(python(stamp, str(i)) for i in range(5)), workers=2)
    times = {one.job.name: [float(word) for word in one.output.split()] for one in found}
    begun = [times[str(i)][0] for i in range(5)]
    for i in range(2, 5):
        assert begun[i] > sorted(times[str(j)][1] for j in range(i))[i - 2]


def test_what_follows_from_one_is_run_before_the_others():
    again = [python("print(2)", "again")]
    jobs = [python("print(1)"), python("print(3)")]
    found, _ = run(*jobs, workers=1, then=lambda one: again and [again.pop()])
    assert [one.output for one in found] == ["1\n", "2\n", "3\n"]


def test_at_its_limit_a_command_can_still_report(hurried):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"
    (one,), _ = run(python(code, seconds=0.2))
    assert (one.late, one.status, one.output) == (True, 0, "saved\n")
    assert one.how == "stopped after 0 s"


def test_where_one_hangs_is_in_its_output(hurried):
    """Whatever it does with Ctrl-C, and with SIGTERM."""
    code = "import signal, time\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\n"
    code += "def stuck(): time.sleep(60)\nstuck()"
    (one,), _ = run(python(code, seconds=0.3))
    assert one.late
    assert one.status == -signal.SIGABRT
    assert "in stuck" in one.output


def test_no_command_outlives_its_limit_nor_what_it_has_started(hurried):
    stubborn = "import signal, time\nfor s in (2, 6, 15): signal.signal(s, signal.SIG_IGN)\n"
    stubborn += "import subprocess, sys\n"
    stubborn += "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
    stubborn += "print(child.pid, flush=True); time.sleep(60)"
    (one,), _ = run(python(stubborn, seconds=0.5))
    assert one.status == -signal.SIGKILL
    state = subprocess.run(["ps", "-o", "stat=", "-p", one.output.strip()], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ("", "Z")


def test_after_the_deadline_none_begins(hurried):
    jobs = [python("import time; time.sleep(60)", "long"), python("print(1)", "next")]
    began = time.monotonic()
    found, left = run(*jobs, workers=1, seconds=0.3)
    assert time.monotonic() - began < 20
    assert [one.job.name for one in found] == ["long"]
    assert [job.name for job in left] == ["next"]


def test_when_all_are_stopped_they_can_report(hurried):
    code = "import time\ntry: print('begun', flush=True); time.sleep(60)\n"
    code += "except KeyboardInterrupt: print('saved')"
    stop = threading.Event()
    jobs = [python(code), python("print(1)", "never")]
    (one,), left = run(*jobs, workers=1, stop=stop, follow=lambda text: stop.set())
    assert (one.late, one.output) == (True, "begun\nsaved\n")
    assert [job.name for job in left] == ["never"]


def test_output_is_handed_on_as_it_comes():
    heard = []
    code = "import time\nfor i in range(3): print(i, flush=True); time.sleep(0.1)"
    (one,), _ = run(python(code), follow=heard.append)
    assert len(heard) > 1
    assert "".join(heard) == one.output == "0\n1\n2\n"


def test_variables_are_added_to_those_that_are_there(monkeypatch):
    monkeypatch.setenv("GIVEN", "a")
    (one,), _ = run(python("import os; print(os.environ['GIVEN'], os.environ['MORE'])", MORE="b"))
    assert one.output == "a b\n"
