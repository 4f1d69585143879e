"""Launches called directly: Triton's own objects, from a compiled kernel to its launcher, without a GPU.

A stand-in driver answers for an H100. It notes what would be launched, and with what.
"""

import pytest
import torch

import fusedcalib
import fusedcalib.executors.choose

pytest.importorskip("triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fusedcalib.engine import engine
from fusedcalib.executors.triton import decide as gpu_control
from fusedcalib.executors.triton import run as gpu
from fusedcalib.kernels import direct, launch
from fusedcalib.kernels.stages import Numbers

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are launched in earnest"),
    pytest.mark.skipif(gpu.interpreted(), reason="the interpreter compiles nothing"),
]


class Utils:
    loaded = 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, kernel, shared, device):
        Utils.loaded += 1
        return object(), f"function of {name}", 64, 0, 1024


class Driver:
    """What Triton asks of a driver to compile, load and launch."""

    def __init__(self):
        self.utils, self.calls, self.stream = Utils(), [], 7
        self.fails = lambda name: None
        outer = self

        class Launcher:
            def __init__(self, src, metadata):
                self.name, self.parameters = metadata.name, len(src.signature)

            def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
                assert function == f"function of {self.name}"
                assert (y, z) == (1, 1)
                assert len(args) == self.parameters
                outer.fails(self.name)
                outer.calls.append((self.name, x, stream, args))

        self.launcher_cls = Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return self.stream

    @property
    def names(self):
        return [name for name, *_ in self.calls]


@pytest.fixture
def stand_in(monkeypatch):
    found = Driver()
    monkeypatch.setattr(driver, "_active", found)
    monkeypatch.setattr(gpu, "interpreted", lambda: True)  # tensors on the CPU will do
    monkeypatch.setattr(gpu_control, "backend", lambda: "cuda")
    for kernel in (*launch.KERNELS.values(), launch.norm_kernel, launch.control_kernel):
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    fusedcalib.executors.choose.choose.cache_clear()
    yield found
    fusedcalib.executors.choose.choose.cache_clear()


def parameters(*shapes, dtype=torch.float32):
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params


def made(params, **options):
    return fusedcalib.AdamW(params, backend="triton", **options)


def addresses(args):
    return [int(x) for x in args if isinstance(x, int) and not isinstance(x, bool)]


def test_a_step_is_called_directly(stand_in, monkeypatch):
    """After the first one Triton's binding is not asked again, and what it would pass is what is passed."""
    optimizer = made(parameters((64, 64), (12,)))
    optimizer.step()
    monkeypatch.setattr(type(launch.KERNELS["step"]), "run", None)  # what kernel[grid](...) calls
    stand_in.calls.clear()
    stand_in.stream = 11
    optimizer.step()
    ((name, programs, stream, args),) = stand_in.calls
    resident = next(iter(optimizer._engine.plan.buckets)).cache["resident"]
    assert (name, programs, stream) == ("step_kernel", len(resident.bucket.tiles), 11)
    tensors = (resident.table, resident.gradients, resident.tiles)
    assert [int(x) for x in args[:3]] == [t.data_ptr() for t in tensors]
    assert Numbers.of_row(args[3]).step == 2.0
    assert all(type(x) is float for x in args[3])


def test_groups_of_one_launch_read_their_rows_from_the_device(stand_in):
    first, second = parameters((64, 64), (64, 64))
    optimizer = made([{"params": [first]}, {"params": [second], "weight_decay": 0.5}])
    optimizer.step()
    (call,) = stand_in.calls
    scalars = call[3][3]
    assert scalars.shape[0] == 2
    kept = int(scalars)
    optimizer.step()
    assert int(stand_in.calls[-1][3][3]) == kept  # at one address for good
    assert [Numbers.of_row(row).step for row in scalars.tensor] == [2.0, 2.0]


def test_doubles_are_not_passed_as_arguments(stand_in):
    """Arguments of kernels are fp32."""
    made(parameters((64, 64), dtype=torch.float64)).step()
    assert stand_in.calls[0][3][3].dtype == torch.float64


def test_everything_is_loaded_before_the_first_launch(stand_in, monkeypatch):
    """With two launches of each kind; the second of a kind cannot fail to compile when the first has run."""
    order = []
    prepare, call = direct.Launch.prepare, direct.Launch.__call__
    monkeypatch.setattr(direct.Launch, "prepare", lambda self: (order.append("prepare"), prepare(self)))
    monkeypatch.setattr(direct.Launch, "__call__", lambda self: (order.append("call"), call(self)))
    params = parameters((64, 64), (12,), (2, 40_000))
    made(params, centralize=True, max_grad_norm=1.0).step()
    first = order.index("call")
    assert order[:first] == ["prepare"] * first
    assert set(order[first:]) == {"call"}
    assert order.count("call") == len(stand_in.calls) >= 6


def test_what_cannot_be_compiled_changes_nothing(stand_in, monkeypatch):
    params = parameters((64, 64), (2, 40_000))
    optimizer = made(params, centralize=True)
    directly = direct.Launch._directly

    def fails(self):
        if self._kernel.__name__ == "row_sums_kernel":
            raise MemoryError
        return directly(self)

    monkeypatch.setattr(direct.Launch, "_directly", fails)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert not stand_in.calls
    assert not optimizer.state
    monkeypatch.undo()


def test_profilers_are_told_of_launches(stand_in):
    """Proton and others hook launches: then Triton's own way is taken."""
    optimizer = made(parameters((64, 64)))
    optimizer.step()
    bound = []
    optimizer._engine.plan.buckets[0].cache["resident"].launches["step"]._bound = lambda: bound.append(1)

    def hook(metadata):
        pass

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        optimizer.step()
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert bound == [1]
    optimizer.step()
    assert bound == [1]
    assert len(stand_in.calls) == 2


def test_a_launcher_of_another_form_is_called_by_triton(stand_in):
    optimizer = made(parameters((64, 64)))

    def other(name):
        if len(stand_in.calls) == 0:
            stand_in.calls.append(("refused",))
            raise TypeError("takes 3 positional arguments")

    stand_in.fails = other
    optimizer.step()
    optimizer.step()
    assert stand_in.names == ["refused", "step_kernel", "step_kernel"]


def test_a_launch_that_is_interrupted_leaves_no_count_behind(stand_in):
    """The second launch of the norm is: the next step measures and counts from the beginning."""
    optimizer = made(parameters((64, 64), (12,), (2, 40_000)), centralize=True, max_grad_norm=1.0)
    optimizer.step()
    first, control = optimizer._engine.plan, optimizer._engine.plan.decider
    control._done.fill_(1)  # as the first launch leaves it, whose programs have counted
    seen = []

    def interrupt(name):
        seen.append(name)
        if seen == ["norm_kernel", "norm_kernel"]:
            raise KeyboardInterrupt

    stand_in.fails = interrupt
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    stand_in.fails = lambda name: None
    optimizer.step()
    assert optimizer._engine.plan is not first
    assert optimizer._engine.plan.decider._done.item() == 0


def test_moved_gradients_are_one_array(stand_in):
    """The tables stay on the device; all addresses go in one copy."""
    params = parameters((64, 64), (12,), (3, 1001))
    optimizer = made(params, centralize=True)
    optimizer.step()
    plan = optimizer._engine.plan
    together = plan.buckets[0].cache["together"]
    assert len(plan.buckets) == 3
    sent = []
    for mirror in (together._gradients, *(r._table for r in together._residents)):
        mirror._send = lambda values, m=mirror, send=mirror._send: (sent.append(m), send(values))
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer._engine.plan is plan
    assert sent == [together._gradients]
    for bucket in plan.buckets:
        resident = bucket.cache["resident"]
        assert resident.gradients[: len(bucket.slots)].tolist() == [
            s.param.grad.data_ptr() for s in bucket.slots
        ]
    optimizer.step()
    assert len(sent) == 1


def test_options_that_change_leave_unchanged_groups_alone(stand_in, monkeypatch):
    """Of a step that the device decides: its options are looked at where a value is another."""
    first, second = parameters((64, 64), (64, 64))
    optimizer = made([{"params": [first]}, {"params": [second]}], capturable=True)
    optimizer.step()
    asked = []
    leaves_of = gpu_control.leaves_of
    monkeypatch.setattr(
        gpu_control,
        "leaves_of",
        lambda tape, recipe, group: (asked.append(group), leaves_of(tape, recipe, group))[1],
    )
    optimizer.step()
    assert not asked
    optimizer.param_groups[1]["lr"] = 0.5
    optimizer.step()
    assert [group is optimizer.param_groups[1] for group in asked] == [True]


def options_on_device(optimizer):
    """The learning rates that the device has, a row of scalars each."""
    control = optimizer._engine.plan.decider
    (index,) = (i for i, leaf in enumerate(control._tape.leaves) if leaf == ("lr", 0))
    rows = control._shape[1]
    return control._options.tensor.view(torch.float64)[index * rows : (index + 1) * rows].tolist()


def two_groups():
    first, second = parameters((64, 64), (64, 64))
    optimizer = made([{"params": [first]}, {"params": [second]}], capturable=True)
    optimizer.step()
    return optimizer, optimizer.param_groups


def test_a_group_that_is_refused_does_not_lose_the_others_options(stand_in, monkeypatch):
    optimizer, (first, second) = two_groups()
    first["lr"], second["lr"] = 0.25, 0.5
    leaves_of = gpu_control.leaves_of

    def refuse(tape, recipe, group):
        if group is second:
            raise ValueError("a hyperparameter lies elsewhere")
        return leaves_of(tape, recipe, group)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_control, "leaves_of", refuse)
        with pytest.raises(ValueError, match="elsewhere"):
            optimizer.step()
    optimizer.step()
    assert options_on_device(optimizer) == [0.25, 0.5]


def test_options_of_a_capture_are_not_lost_to_later_steps(stand_in, monkeypatch):
    """The capture has a copy of its own; another group's change must not bring the old ones back."""
    optimizer, (first, second) = two_groups()
    first["lr"] = 0.25
    with monkeypatch.context() as patch:
        for module in (gpu, gpu_control, engine):
            patch.setattr(module, "capturing", lambda: True)
        optimizer.step()
    second["lr"] = 0.5
    optimizer.step()
    assert options_on_device(optimizer) == [0.25, 0.5]
