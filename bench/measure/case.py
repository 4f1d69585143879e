"""One case: several methods on one parameter list, gated, timed together and written as data."""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..env import machine
from ..models import shapes
from ..models.shapes import ParamList
from ..models.traffic import CACHED, DTYPES
from ..report.results import Measured, Row
from . import clocks, gate, spare
from .baselines import METHODS
from .clocks import ANCHORS, Effort, Tell
from .method import ADAMW, SUBJECTS, Built, Method, NotAvailableError, Subject
from .rivals import sentence

SAMPLE = 2**21  # elements of a list that the gate judges: every row of a short list, some of a long one


@dataclass(frozen=True)
class Case:
    """What to measure. Lists, methods and subjects are given by their names, or as they are."""

    list: str | ParamList
    methods: tuple[str | Method, ...]
    dtypes: str = "fp32"
    subject: str | Subject = "AdamW"
    extras: str = ""  # what the case is about besides its rule: a name of method.EXTRAS, or one like it
    bases: tuple[str, ...] = ANCHORS  # the first that was measured is what tables give the ratios to

    @property
    def title(self) -> str:
        name = self.list if isinstance(self.list, str) else self.list.name
        return f"{name} {self.subject_title} {self.dtypes}{self.extras and f' with {self.extras}'}"

    @property
    def subject_title(self) -> str:
        return self.subject if isinstance(self.subject, str) else self.subject.title or self.subject.cls

    def rows(self) -> dict[str, Method]:
        """The methods by name."""
        found = (METHODS[method] if isinstance(method, str) else method for method in self.methods)
        return {method.name: method for method in found}


class Prepared:
    """A case with everything looked up, and what became of its methods."""

    def __init__(self, case: Case, device: torch.device, tell: Tell) -> None:
        self.spec = shapes.get(case.list) if isinstance(case.list, str) else case.list
        self.subject = SUBJECTS[case.subject] if isinstance(case.subject, str) else case.subject
        self.rows = case.rows()
        self.storage = DTYPES[case.dtypes]
        self.device, self.tell = device, tell
        self.reasons: dict[str, str] = {}
        self.states = self.subject.states()

    def width(self, *methods: Method) -> float:
        """Bytes that a step of one of these moves for each parameter, the most."""
        looked = self.subject.looked()
        widths = (m.extras.width(m.storage(self.storage), self.states, looked) for m in methods)
        return max(widths, default=0)

    def build(self) -> dict[str, Built]:
        """Each method that can be had, on its own copy of the list."""
        built: dict[str, Built] = {}
        sources: dict[torch.dtype, list[Tensor]] = {}
        for index, (name, method) in enumerate(self.rows.items()):
            self.tell(f"building {method.title}", index / len(self.rows))
            dtype = method.storage(self.storage).param
            params = shapes.build(self.spec, self.device, dtype, sources.get(dtype))
            try:
                made = method.make(self.spec, params, self._subject_of(method))
            except Exception as error:  # of another library: it costs that method only
                self.reasons[name] = sentence(error)
            else:
                built[name] = replace(made, params=params)
                sources[dtype] = params
        return built

    def _subject_of(self, method: Method) -> Subject:
        options = method.storage(self.storage).options
        if options and not method.own and not method.form:
            raise NotAvailableError("takes no state of another type than the parameter's")
        return replace(self.subject, own=self.subject.own | options)

    def judge(self, built: dict[str, Built]) -> dict[str, gate.Verdict]:
        """Hold all against the reference; what does not pass is taken out of `built`."""
        alike: dict[torch.dtype, dict[str, gate.Entry]] = {}
        for name, one in built.items():
            storage = self.rows[name].storage(self.storage)
            alike.setdefault(storage.param, {})[name] = _entry(self.rows[name], one, storage.coded)
        self.tell("three steps of each, held against float64", 0)
        every = max(1, self.spec.params // SAMPLE)
        verdicts: dict[str, gate.Verdict] = {}
        for gated in alike.values():
            verdicts |= gate.check(self.spec, gated, self.subject, every)
        for name, verdict in verdicts.items():
            if fault := verdict.fault or self._fault(self.rows[name], built[name]):
                self.reasons[name] = fault
                del built[name]
        return verdicts

    def _fault(self, method: Method, built: Built) -> str | None:
        """Judges what the gate cannot see, and gives the method its noise back."""
        if built.set_noise and method.extras.noise is not None:
            built.set_noise(method.extras.noise)
        subject, storage = self.subject, method.storage(self.storage)
        # States in bytes cannot be read: the same is judged where they are plain.
        dtype = torch.float32 if storage.packed else storage.param
        if method.like is not None or not spare.shows_gradient(subject):
            method, subject = (
                replace(method, make=method.like or method.make),
                replace(ADAMW, own=subject.own),
            )
        try:
            return spare.fault(method, subject, self.device, dtype)
        except Exception as error:  # as in the gate
            return sentence(error)


def run(case: Case, device: torch.device, effort: Effort, tell: Tell = lambda what, share: None) -> Measured:
    """Measure a case. A method that cannot run, or fails the gate, gets a reason and no numbers.

    `tell` is told what is being done. What was measured when the user interrupts it (Ctrl-C) while methods
    are timed is returned, "incomplete" in it.
    """
    work = Prepared(case, device, tell)
    gpu = machine.on_gpu(device)
    width = work.width(*work.rows.values())
    flush = gpu and work.spec.params * width < CACHED
    built = work.build()
    verdicts = work.judge(built)
    methods = _refreshed(work.spec, built)
    # What has extras moves more than the stream beside it would.
    streams = case.dtypes == "fp32" and work.spec.params >= 2**20 and not case.extras
    timed = clocks.measure(
        *(work.spec, methods, device, effort, tell),
        flush=flush,
        reads=2 + work.states if streams else None,
        references=tuple(name for name, method in work.rows.items() if method.reference),
    )
    reasons = work.reasons | timed.reasons
    rows = {name: empty_row(method) for name, method in work.rows.items()} | timed.rows
    for name, row in rows.items():
        row.reason = reasons.get(name)
        if name in work.rows:
            row.title, row.options = work.rows[name].title, asdict(work.rows[name].extras)
        if name in timed.rows and name in verdicts:
            row.max_err_vs_fp64, row.first_steps_s = verdicts[name].max_err, verdicts[name].seconds
            row.note, row.bytes_per_param = methods[name].note, work.width(work.rows[name])
    del built, methods
    _let_go(gpu)
    return Measured(
        list=work.spec.name,
        tensors=work.spec.tensors,
        params=work.spec.params,
        dtypes=case.dtypes,
        subject=case.subject_title,
        hyper=dict(work.subject.options),
        extras=case.extras,
        base=next((name for name in case.bases if name in timed.rows), None),
        bytes_per_param=width,
        flush="write" if flush else "none",
        clock="device" if gpu else "wall",
        methods=list(rows.values()),
        incomplete=timed.interrupted,
    )


def _let_go(gpu: bool) -> None:
    """Frees the memory of a case."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()


def _entry(method: Method, built: Built, coded: bool = False) -> gate.Entry:
    """A method for the gate: without its noise, and clipped by the norm that it has."""
    if built.set_noise:
        built.set_noise(0.0)
    extras = replace(method.extras, noise=None)
    form = method.form or ("fusedcalib" if coded else "")
    kind = gate.Kind(extras, built.spoils and extras.clip is not None, method.narrow, form)
    return gate.Entry(kind, built.params, built.step, built.averages)


@torch.no_grad()
def _refreshed(spec: shapes.ParamList, built: dict[str, Built]) -> dict[str, Built]:
    """The methods; those that change their gradients are given them anew from a pool."""
    spoiling = [one.params for one in built.values() if one.spoils]
    if spoiling:
        shapes.load_gradients(spec, spoiling, 0)
    pool = [param.grad.clone() for param in spoiling[0] if param.grad is not None] if spoiling else []

    def refresh(params: list[Tensor]) -> None:
        for param, value in zip(params, pool, strict=True):
            assert param.grad is not None
            param.grad.copy_(value)

    return {
        name: replace(one, fresh=partial(refresh, one.params)) if one.spoils else one
        for name, one in built.items()
    }


def empty_row(method: str | Method) -> Row:
    """A method's row before anything is known."""
    known = METHODS.get(method) if isinstance(method, str) else method
    return (
        Row(known.name, known.title, asdict(known.extras)) if known else Row(str(method), "memory stream", {})
    )
