"""A launch that is compiled and loaded beforehand, then called directly.

Triton's own `kernel[grid](...)` binds, inspects and looks up its arguments anew at each call: 15 us of the
host, where the launch itself takes two. What is compiled depends on little of them: whether an argument is
None, and whether an address is a multiple of 16.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .language import AVAILABLE

if AVAILABLE:
    from triton import knobs
    from triton.runtime import driver


class Address(int):
    """Where a tensor lies, as launchers take it without asking; it stands for the tensor in all else."""

    tensor: Any

    def __new__(cls, tensor: Any) -> "Address":
        address = super().__new__(cls, tensor.data_ptr())
        address.tensor = tensor  # which lives as long
        return address

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


class Launch:
    """One launch of a kernel over so many programs.

    Args:
        kernel: a function of `triton.jit`.
        programs: of the launch.
        args: tensors at addresses that stay, numbers, None, and tuples of them.
        constants: compile-time arguments and options, by name.
    """

    def __init__(self, kernel: Any, programs: int, args: Sequence[Any], constants: dict[str, Any]) -> None:
        self._kernel, self._grid, self._constants = kernel, (programs, 1, 1), constants
        self._args = list(args)
        self._passed = [_passed(value) for value in args]
        self._call: Callable[[], object] | None = None

    def set(self, place: int, value: Any) -> None:
        """Takes over another argument; another kernel is compiled if it needs one."""
        if _kind(value) != _kind(self._args[place]):
            self._call = None
        self._args[place], self._passed[place] = value, _passed(value)

    def prepare(self) -> None:
        """Compiles the kernel and loads it onto the current device, unless that is done."""
        if self._call is None:
            self._call = self._directly() or self._bound

    def __call__(self) -> None:
        """Launches on the current stream of the current device."""
        if self._call is None:
            self.prepare()
        assert self._call is not None
        self._call()

    def _bound(self) -> None:
        self._kernel[self._grid](*self._args, **self._constants)

    def _directly(self) -> Callable[[], object] | None:
        """The compiled kernel called as Triton calls it; None where it is not of the form that is known."""
        if not AVAILABLE or not hasattr(self._kernel, "warmup") or not hasattr(self._kernel, "device_caches"):
            return None  # the interpreter compiles nothing
        compiled = self._kernel.warmup(*self._args, grid=self._grid, **self._constants)
        try:
            run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
            names = list(self._kernel.signature.parameters)[len(self._args) :]
            active, constants = driver.active, [self._constants[name] for name in names]
            current_device, current_stream = active.get_current_device, active.get_current_stream
        except (AttributeError, KeyError):
            return None
        grid, passed = self._grid, self._passed

        def call() -> None:
            if _hooked():
                return self._bound()
            stream = current_stream(current_device())
            try:
                run(*grid, stream, function, packed, None, None, None, *passed, *constants)
            except TypeError:  # other arguments than of the Tritons that are known: nothing was launched
                self._call = self._bound
                self._bound()

        return call


def _hooked() -> bool:
    """Whether a profiler wants to be told of launches."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _passed(value: Any) -> Any:
    """An argument as launchers take it at once."""
    if isinstance(value, tuple):
        return tuple(map(_passed, value))
    return Address(value) if hasattr(value, "data_ptr") else value


def _kind(value: Any) -> Any:
    """What of an argument decides which kernel is compiled; of a float nothing."""
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    if hasattr(value, "data_ptr"):
        return value.dtype, value.data_ptr() % 16 == 0
    return float if isinstance(value, float) else (value,)
