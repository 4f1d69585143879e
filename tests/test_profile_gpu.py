"""The profile on a GPU, with events that no GPU made: all of it but the profiler's own call."""

import json
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import INTERPRETED
from profile_subjects import SMALL, launched

from fusedcalib import __main__ as command
from fusedcalib.bench.measure import probe, timing
from fusedcalib.bench.measure.probe import Event
from fusedcalib.bench.predict import profile_gpu, profile_steps
from fusedcalib.bench.predict.profile_steps import ProfileCase, Variant

pytest.importorskip("triton")
__all__ = ["launched"]  # a fixture
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")


def fabricated(name, start, took, device="DeviceType.CUDA"):
    """As torch.profiler has it."""
    span = SimpleNamespace(start=start, elapsed_us=lambda: took)
    return SimpleNamespace(name=name, device_type=device, time_range=span)


def test_events_on_the_device_in_the_order_of_their_start():
    events = [
        fabricated("step_kernel", 20.0, 5.0),
        fabricated("aten::add", 1.0, 2.0, "DeviceType.CPU"),
        fabricated("Optimizer.step#AdamW.step", 5.0, 30.0),
        fabricated("ProfilerStep#1", 5.0, 30.0),
        fabricated("norm_kernel", 10.0, 3.0),
    ]
    assert probe.on_device(events) == [Event("norm_kernel", 10.0, 3.0), Event("step_kernel", 20.0, 5.0)]


EXPECTED = [Variant(kernel, None, profile_steps.NOTHING) for kernel in ("norm", "step", "step")]
ONE = ["norm_kernel", "Memcpy HtoD", "step_kernel", "step_kernel"]


def test_a_kernel_of_a_step_is_known_by_its_place():
    """The median of each over the steps; what else ran is told as a mean."""
    took = {0: [1, 9, 10, 20], 1: [2, 9, 11, 21], 2: [90, 9, 12, 22]}
    events = [Event(name, 0.0, took[step][i]) for step in took for i, name in enumerate(ONE)]
    assert profile_gpu.attributed(events, EXPECTED, 3) == ([2, 11, 21], 9)


@pytest.mark.parametrize("names", [ONE[:-1], [*ONE, "step_kernel"], ONE[::-1], []])
def test_other_kernels_than_were_launched_are_no_profile(names):
    with pytest.raises(ValueError, match="of our kernels in 1 steps, where 3 were launched"):
        profile_gpu.attributed([Event(name, 0.0, 1.0) for name in names], EXPECTED, 1)


def test_names_are_those_of_the_kernels():
    from fusedcalib.kernels import launch

    kernels = {**launch.KERNELS, "norm": launch.norm_kernel, "control": launch.control_kernel}
    assert {name: kernel.fn.__name__ for name, kernel in kernels.items()} == profile_gpu.NAMES


@pytest.fixture
def profiled(launched, monkeypatch):
    """A GPU whose kernels take 10 microseconds each: what the engine launches, told as events."""

    def captured(step, device, steps):
        launched.clear()
        for _ in range(steps):
            step()
        return [Event(profile_gpu.NAMES[name], float(i), 10.0) for i, (name, _) in enumerate(launched)]

    monkeypatch.setattr(profile_gpu, "here", lambda: CPU)
    monkeypatch.setattr(profile_gpu, "captured", captured)
    monkeypatch.setattr(profile_gpu.ceilings, "measure", lambda device: {"copy_gbs": 4000.0})
    monkeypatch.setattr(timing, "host_seconds", lambda device, step: 25e-6)


CPU = torch.device("cpu")


@pytest.mark.parametrize("options", [(), ("max_grad_norm", "centralize"), ("capturable",)])
def test_bytes_and_times_meet(options, profiled):
    results = profile_gpu.profile([ProfileCase("AdamW", options)], SMALL, CPU)
    (found,) = results.cases
    kernels = found.kernels
    assert [k.kernel for k in kernels] == [
        v.kernel for v in profile_steps.variants(ProfileCase("AdamW", options), SMALL)
    ]
    assert found.device_us == 10 * len(kernels)
    assert found.host_us == pytest.approx(25)
    for kernel in kernels:
        if kernel.kernel == "control":
            assert kernel.gbs is None
            continue
        assert kernel.moved == kernel.bytes * kernel.elements
        assert kernel.gbs == pytest.approx(kernel.moved / 10e-6 / 1e9)
        assert kernel.pct_copy == pytest.approx(100 * kernel.gbs / 4000)
    width = 28 + 4 * ("max_grad_norm" in options)
    assert found.moved == SMALL.count * width + 4 * 80_000 * ("centralize" in options)


def test_a_gpu_is_measured_where_none_is_named(profiled, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    shapes, data, figure = (tmp_path / name for name in ("m.json", "p.json", "p.png"))
    shapes.write_text('[{"name": "fc.weight", "shape": [64, 96]}, {"name": "fc.bias", "shape": [64]}]')
    arguments = ["profile", "--shapes", str(shapes), "--options", "capturable"]
    assert command.main([*arguments, "--json", str(data), "--plot", str(figure)]) == 0
    said = capsys.readouterr().out
    assert "a copy moves 4,000 GB/s" in said
    assert "25.0 us on the host" in said
    assert "partly in the L2 cache" in said
    assert json.loads(data.read_text())["cases"][0]["moved"] == 28 * (64 * 96 + 64)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_case_that_breaks_costs_that_case_only(profiled, monkeypatch, tmp_path, capsys):
    """And what was measured before is written, whatever becomes of the rest."""
    made, data = profile_gpu.made, tmp_path / "p.json"
    written = []

    def breaks(case, *given):
        written.append(json.loads(data.read_text())["cases"] if data.exists() else [])
        if case.optimizer == "SGD":
            raise RuntimeError("no such instruction")
        return made(case, *given)

    monkeypatch.setattr(profile_gpu, "made", breaks)
    (shapes := tmp_path / "m.json").write_text('[{"name": "fc.weight", "shape": [64, 96]}]')
    names = ["--optimizer", "AdamW", "SGD", "Lion"]
    assert command.main(["profile", "--shapes", str(shapes), *names, "--json", str(data)]) == 2
    assert [len(cases) for cases in written] == [0, 1, 1]
    results = json.loads(data.read_text())
    assert [case["optimizer"] for case in results["cases"]] == ["AdamW", "Lion"]
    assert results["failures"] == [{"case": "SGD, fp32", "error": "RuntimeError: no such instruction"}]
    said = capsys.readouterr()
    assert "SGD, fp32: RuntimeError: no such instruction" in said.err
    assert said.out.count("a copy moves") == 1
    assert said.out.count("us on the host") == 2


def test_a_model_that_does_not_fit_is_said(profiled, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(profile_gpu, "made", full)
    assert command.main(["profile"]) == 2
    assert "gpt2 does not fit on cpu: take a smaller --model" in capsys.readouterr().err
