"""What became of tests that several processes ran: read as it comes, written as one JUnit file, summed up.

The lines are those of tests/outcomes_plugin.py.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd]")  # what no XML may hold, as colours of a terminal
FIRST = 40  # failures that are named


@dataclass
class Outcome:
    """A test: "passed", "failed", "skipped", or "began" where it has not ended."""

    test: str
    outcome: str = "began"
    seconds: float = 0.0
    text: str = ""
    brief: str = ""


@dataclass
class Group:
    """Tests of one process, or of several where the first died."""

    name: str
    tests: list[Outcome] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)  # how a process ended that did not end well
    seconds: float = 0.0

    def count(self) -> Counter[str]:
        return Counter(one.outcome for one in self.tests)

    @property
    def is_well(self) -> bool:
        return not self.ends and all(one.outcome in ("passed", "skipped") for one in self.tests)


def read(path: Path) -> list[Outcome]:
    """The tests of a file, in the order in which they began; none where there is no file."""
    found: dict[str, Outcome] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:  # the last line of a process that was killed
            continue
        found[line["test"]] = Outcome(**line)
    return list(found.values())


def close(path: Path, how: str) -> str | None:
    """The test in which the process ended that wrote the file: it has failed, and the file says so now."""
    began = [one.test for one in read(path) if one.outcome == "began"]
    with path.open("a", encoding="utf-8") as file:
        for test in began:
            file.write(f"\n{json.dumps({'test': test, 'outcome': 'failed', 'brief': how})}\n")
    return began[-1] if began else None


def write(groups: Sequence[Group], path: Path) -> None:
    """The JUnit file. Whoever reads it finds the old one or the new one, never half of either."""
    root = ElementTree.Element("testsuites")
    for group in groups:
        count = group.count()
        suite = ElementTree.SubElement(root, "testsuite", name=group.name, time=f"{group.seconds:.3f}")
        suite.attrib |= {"tests": str(len(group.tests)), "failures": str(count["failed"]), "errors": "0"}
        suite.set("skipped", str(count["skipped"]))
        for one in group.tests:
            where, _, name = one.test.partition("::")
            case = ElementTree.SubElement(suite, "testcase", classname=where, name=name)
            case.set("time", f"{one.seconds:.3f}")
            if one.outcome == "failed":
                ElementTree.SubElement(case, "failure", message=_clean(one.brief)).text = _clean(one.text)
            elif one.outcome == "skipped":
                ElementTree.SubElement(case, "skipped")
        if group.ends:
            ElementTree.SubElement(suite, "system-err").text = _clean("\n".join(group.ends))
    new = path.with_name(f".{path.name}")
    ElementTree.ElementTree(root).write(new, encoding="utf-8", xml_declaration=True)
    os.replace(new, path)


def _clean(text: str) -> str:
    return NO_XML.sub("?", text)


def counted(count: Counter[str]) -> str:
    return ", ".join(f"{count[what]} {what}" for what in ("passed", "failed", "skipped"))


def summary(groups: Sequence[Group]) -> list[str]:
    """A line for the groups of each file, the failures, each kind once, and all together."""
    files: dict[str, list[Group]] = {}
    for group in groups:
        files.setdefault(group.name.partition(" ")[0], []).append(group)
    width = max(map(len, files), default=0)
    lines = []
    total: Counter[str] = Counter()
    for name, found in files.items():
        count = sum((group.count() for group in found), Counter[str]())
        total += count
        lines.append(f"{name:<{width}}  {counted(count)}, {sum(group.seconds for group in found):.0f} s")
        lines += [f"{'':<{width}}  {group.name}: {how}" for group in found for how in group.ends]
    return [*lines, "", *failures(groups), counted(total)]


def failures(groups: Iterable[Group]) -> list[str]:
    """What failed, the most frequent first: tests that say the same fail of one cause, as a rule."""
    kinds: dict[str, list[str]] = {}
    for group in groups:
        for one in group.tests:
            if one.outcome == "failed":
                kinds.setdefault(one.brief, []).append(one.test)
    ordered = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    lines = []
    for what, tests in ordered[:FIRST]:
        lines += [f"{len(tests)} x {what}", f"    {tests[0]}"]
    if len(ordered) > FIRST:
        lines.append(f"and {len(ordered) - FIRST} other kinds of failure")
    return [*lines, ""] if lines else []
