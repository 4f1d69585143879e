"""Captured steps as a CUDA graph replays them: the same copies and launches again, whatever was done since.

Without a GPU a capture is played: launches and captured copies are noted instead of done, and done by each
replay. What they read is what a graph would read.
"""

import math

import pytest
import torch
from cases import DEVICE, assert_near, parameters, tolerance
from kernel_cases import TRITON
from rule_cases import RULES, each

import fusedcalib
from fusedcalib.engine import engine
from fusedcalib.executors.triton import decide as gpu_control
from fusedcalib.executors.triton import run as gpu
from fusedcalib.executors.triton.resident import DeviceArray
from fusedcalib.kernels import direct

pytestmark = pytest.mark.parametrize("backend", [TRITON])
SHAPES = ((5, 7), (33,), (3, 300))
CHAIN = {"max_grad_norm": 1.0, "ema_decay": 0.9, "centralize": True, "skip_nonfinite": True}


class CudaGraph:
    """A graph in earnest."""

    def __init__(self, monkeypatch):
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, step):
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            step()
        return self

    def replay(self):
        self._graph.replay()


class PlayedGraph:
    """What a capture has noted."""

    def __init__(self, monkeypatch):
        self.work = []
        self._patch = monkeypatch

    def capture(self, step):
        with self._patch.context() as patch:
            for module in (gpu, gpu_control, engine):
                patch.setattr(module, "capturing", lambda: True)
            patch.setattr(direct.Launch, "__call__", lambda launch: self._note(launch))
            captured = DeviceArray.captured
            patch.setattr(
                DeviceArray,
                "captured",
                lambda array, values: self._note_copy(captured(array, values), array),
            )
            step()
        return self

    def _note(self, launch):
        kernel, grid, args, constants = launch._kernel, launch._grid, list(launch._args), launch._constants
        self.work.append(lambda: kernel[grid](*args, **constants))

    def _note_copy(self, tensor, mirror):
        buffer, _ = mirror._captured[-1]
        self.work.append(lambda: tensor.copy_(buffer))
        tensor.zero_()  # it is not there before the graph runs
        return tensor

    def replay(self):
        assert self.work
        for each_work in self.work:
            each_work()


Graph = CudaGraph if DEVICE == "cuda" else PlayedGraph


@pytest.fixture
def graph(monkeypatch):
    return Graph(monkeypatch)


class Runs:
    """`ours` captured, `theirs` on the host, from the same start."""

    def __init__(self, rule, backend, **options):
        torch.manual_seed(0)
        self.params = parameters(SHAPES, torch.float32)
        self.others = [torch.nn.Parameter(p.detach().clone()) for p in self.params]
        self.ours = rule.ours(self.params, backend=backend, capturable=True, **{**rule.options, **options})
        self.theirs = rule.ours(self.others, backend="eager", **{**rule.options, **options})
        self.static = [torch.zeros_like(p) for p in self.params]
        self.steps = 0

    def gradients(self, into=None):
        """Gradients for the next step of both: of ours new ones, or those given."""
        for i, (p, q) in enumerate(zip(self.params, self.others, strict=True)):
            q.grad = torch.randn_like(q)
            if into is None:
                p.grad = q.grad.clone()
            else:
                into[i].copy_(q.grad)

    def both(self, step):
        step()
        self.theirs.step()
        self.steps += 1
        for p, q in zip(self.params, self.others, strict=True):
            assert_near(p, q, tolerance(p.dtype, self.steps), f"parameter after step {self.steps}")

    def use_static(self):
        for p, g in zip(self.params, self.static, strict=True):
            p.grad = g


@pytest.mark.parametrize("options", [{}, CHAIN], ids=["plain", "chain"])
@each({name: RULES[name] for name in ("SGD", "AdamW", "NAdam")})
def test_replays_read_the_gradients_of_the_capture(rule, backend, options, graph):
    """An eager step with other gradients, and other numbers, lies between the capture and its replays."""
    runs = Runs(rule, backend, **options)
    runs.use_static()
    for _ in range(2):
        runs.gradients(runs.static)
        runs.both(runs.ours.step)
    graph.capture(runs.ours.step)
    runs.gradients(runs.static)
    runs.both(graph.replay)
    for optimizer_ in (runs.ours, runs.theirs):
        optimizer_.param_groups[0]["lr"] *= 0.5
    runs.gradients()
    runs.both(runs.ours.step)  # gradients elsewhere, other numbers
    for optimizer_ in (runs.ours, runs.theirs):
        optimizer_.param_groups[0]["lr"] *= 2
    runs.use_static()
    for _ in range(2):
        runs.gradients(runs.static)
        runs.both(graph.replay)
    runs.gradients(runs.static)
    runs.both(runs.ours.step)  # and eager ones read theirs after a replay


def test_replays_measure_lists_that_are_kept_otherwise(backend, graph):
    """In one launch, which reads the addresses of the gradients of all lists."""
    params = parameters(((8, 128), (64,), (2, 64)), torch.bfloat16)
    options = {"state_dtype": "8bit", "min_8bit_size": 0, "max_grad_norm": 1.0, "capturable": True}
    optimizer = fusedcalib.AdamW(params, backend=backend, **options)
    static = [torch.ones_like(p) for p in params]
    elements = sum(p.numel() for p in params)

    def step(take, gradients, value):
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.fill_(value)
        take()
        assert optimizer.grad_norm.item() == pytest.approx(value * elements**0.5, rel=1e-6)

    step(optimizer.step, static, 1.0)
    graph.capture(optimizer.step)
    step(graph.replay, static, 2.0)
    step(optimizer.step, [torch.ones_like(p) for p in params], 3.0)  # gradients elsewhere
    step(graph.replay, static, 4.0)
    step(optimizer.step, static, 5.0)


def test_two_graphs(backend, monkeypatch):
    """Each has gradients and numbers of its own."""
    runs = Runs(RULES["AdamW"], backend)
    seconds = [torch.zeros_like(p) for p in runs.params]
    runs.use_static()
    runs.gradients(runs.static)
    runs.both(runs.ours.step)
    first = Graph(monkeypatch).capture(runs.ours.step)
    runs.gradients()
    runs.both(runs.ours.step)
    for p, g in zip(runs.params, seconds, strict=True):
        p.grad = g
    second = Graph(monkeypatch).capture(runs.ours.step)
    for graph, grads in ((first, runs.static), (second, seconds), (first, runs.static)):
        runs.gradients(grads)
        runs.both(graph.replay)


def test_two_captures_need_a_step_between(backend, monkeypatch):
    runs = Runs(RULES["AdamW"], backend)
    runs.gradients()
    runs.both(runs.ours.step)
    Graph(monkeypatch).capture(runs.ours.step)
    with pytest.raises(RuntimeError, match="between two"):
        Graph(monkeypatch).capture(runs.ours.step)


def leave_out(runs, *indices):
    runs.gradients()
    for i in indices:
        runs.params[i].grad = runs.others[i].grad = None
    runs.both(runs.ours.step)


def test_a_graph_counts_where_later_plans_count(backend, graph):
    """Steps of other live parameters lie between: replays go on from their counts."""
    runs = Runs(RULES["AdamW"], backend)
    leave_out(runs, 1)
    leave_out(runs, 0, 2)
    runs.use_static()
    runs.gradients(runs.static)
    runs.both(runs.ours.step)  # all have taken as many, but it is known that they need not
    graph.capture(runs.ours.step)
    leave_out(runs, 1)
    runs.use_static()
    for _ in range(2):
        runs.gradients(runs.static)
        runs.both(graph.replay)
    assert [int(runs.ours.state[p]["step"]) for p in runs.params] == [5, 4, 5]


def test_a_set_of_parameters_that_parts_a_graphs_is_told_of(backend, graph):
    runs = Runs(RULES["AdamW"], backend)
    runs.use_static()
    runs.gradients(runs.static)
    runs.both(runs.ours.step)
    graph.capture(runs.ours.step)
    with pytest.warns(UserWarning, match="capture it again"):
        leave_out(runs, 1)


def test_numbers_of_a_skipped_step(backend, graph):
    runs = Runs(RULES["AdamW"], backend, **CHAIN)
    runs.use_static()
    runs.gradients(runs.static)
    runs.both(runs.ours.step)
    graph.capture(runs.ours.step)
    before = [p.detach().clone() for p in runs.params]
    runs.static[0][0, 0] = math.inf
    graph.replay()
    assert all(torch.equal(p, q) for p, q in zip(runs.params, before, strict=True))
    assert runs.ours.skipped_steps.item() == 1
    runs.gradients(runs.static)
    runs.both(graph.replay)


def test_a_step_that_is_not_ready_is_not_captured(backend, graph):
    (w,) = parameters(((4, 4),))
    w.grad = torch.ones_like(w)
    opt = fusedcalib.AdamW([w], backend=backend, capturable=True)
    with pytest.raises(RuntimeError, match="run some steps before"):
        graph.capture(opt.step)
