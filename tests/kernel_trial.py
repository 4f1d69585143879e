"""A trial: one optimizer over tensors that lie in memory in hostile ways, judged at every step."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from kernel_cases import Case, device_of

from fusedcalib.reference import ORACLES


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


# Views by name: strides for a shape, as the operation of that name makes them.
VIEWS: dict[str, Callable[..., torch.Tensor]] = {
    "contiguous": meta,
    "unaligned": meta,
    "transposed": lambda *s: meta(*s[::-1]).permute(*range(len(s))[::-1]),
    "channels last": lambda *s: meta(*s).contiguous(memory_format=torch.channels_last),
    "channels last 3d": lambda *s: meta(*s).contiguous(memory_format=torch.channels_last_3d),
    "permuted": lambda a, b, c, d, e: meta(a, d, b, e, c).permute(0, 2, 4, 1, 3),
    "every other column": lambda *s: meta(*s[:-1], 2 * s[-1])[..., ::2],
    "every other row": lambda n, *s: meta(2 * n, *s)[::2],
    "columns of a wider": lambda n, m: meta(n, m + 3)[:, :m],
    "one row expanded": lambda n, *s: meta(1, *s).expand(n, *s),
}
GUARD = 64  # elements of NaN on either side; a multiple of every vector


def placed(values: torch.Tensor, view: str, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """The values as a view into memory that holds NaN everywhere else."""
    strides = VIEWS[view](*values.shape).stride()
    reach = 1 + sum(s * (n - 1) for s, n in zip(strides, values.shape, strict=True))
    start = GUARD + (view == "unaligned")
    memory = torch.full((start + max(reach, 0) + GUARD,), math.nan, dtype=dtype, device=device)
    target = found = memory.as_strided(values.shape, strides, start)
    for d, stride in enumerate(strides):
        if stride == 0 and values.shape[d]:  # written once
            target, values = target.narrow(d, 0, 1), values.narrow(d, 0, 1)
    target.copy_(values)
    return found


def memory_of(t: torch.Tensor) -> torch.Tensor:
    """All elements of the memory that a view is made of."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def bits(t: torch.Tensor) -> torch.Tensor:
    """The values as integers; all NaN alike, whose payload no one promises."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    plain = torch.where(t.isnan(), torch.full_like(t, math.nan), t)
    return plain.contiguous().view(integers).cpu()


def assert_untouched_around(t: torch.Tensor) -> None:
    memory = memory_of(t)
    places = torch.arange(memory.numel()).as_strided(t.shape, t.stride(), t.storage_offset())
    outside = torch.ones(memory.numel(), dtype=torch.bool)
    outside[places.flatten()] = False
    assert memory.cpu()[outside].isnan().all(), "written outside of a view"


class Arrangement(NamedTuple):
    """A shape, and how its tensors lie in memory; the optimizer makes the state if `state` is None."""

    shape: tuple[int, ...]
    param: str = "contiguous"
    grad: str = "contiguous"
    state: str | None = None


def _of_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one number for each row."""
    return shape[:1] + (1,) * (len(shape) - 1)


def parameter_values(shape: tuple[int, ...]) -> torch.Tensor:
    """Up to 0.75; the norm of a row of n is 0.2 to 0.4 times the root of n, where n is not small."""
    scale = 0.5 + torch.rand(_of_rows(shape), dtype=torch.float64) / 2
    return scale * (1.5 * torch.rand(shape, dtype=torch.float64) - 0.75)


def gradient_values(shape: tuple[int, ...]) -> torch.Tensor:
    """Of size 1 to 1.25 and alternating sign, plus up to 0.3 that the elements of a row share.

    With penalties (0.25) and without its row mean an element is still 0.4 to 1.8 in size: Adam's quotient
    m / sqrt(v) is well-conditioned, and a tolerance of a few roundings can be asked of it.
    """
    signs = (1 - 2.0 * (torch.arange(math.prod(shape)) % 2)).reshape(shape)
    sign = 1 - 2 * torch.randint(2, ())
    g = sign * signs * (1 + torch.rand(shape, dtype=torch.float64) / 4)
    return g + 0.6 * torch.rand(_of_rows(shape), dtype=torch.float64) - 0.3


class Trial:
    """An optimizer over one parameter per arrangement; each step is judged from where it started.

    The oracle takes the very numbers that are stored, in float64, so errors do not pile up: what is
    allowed is half a unit in the last place of what is stored, and the roundings of the arithmetic.
    Those have u = eps / 2 of fp32 (fp64 for fp64 parameters) times magnitudes up to 2: a row mean
    has at most 32 additions in a row (32 u of its mean magnitude 1.1), which enters moments and buffers
    as it is, and a quotient at most twice; about 16 more operations follow. 128 u = 64 eps with centring,
    32 u = 16 eps without.

    A row of n is projected where its norm passes c = 0.3 sqrt(n). Errors of r in its elements are an error
    of r sqrt(n) in its norm at most, 3.3 r of it; the sum of n squares and its root have another 20 u
    (again 32 additions, halved by the root). So of p c / norm, with |p| < 1: 4.3 r + 20 u < 5 r. Where the
    row is written before it is scaled, as on a CPU and where a tile does not hold it, p is rounded
    to storage twice, and on a CPU its norm is that of rounded numbers: three halves of a unit.
    """

    def __init__(self, backend: str, case: Case, arrangements: Iterable[Arrangement], seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.backend, self.case, self.arrangements = backend, case, list(arrangements)
        self.device = device_of(backend)
        self.params: list[torch.nn.Parameter] = []
        self.guarded: list[torch.Tensor] = []  # memory around them holds NaN
        for a in self.arrangements:
            data = placed(parameter_values(a.shape), a.param, case.dtypes.param, self.device)
            self.params.append(torch.nn.Parameter(data))
        self.guarded += self.params
        groups = [{"params": [p], **self._own(p)} for p in self.params]
        self.optimizer = case.ours(groups, backend=backend, **case.options)
        for i, (a, p) in enumerate(zip(self.arrangements, self.params, strict=True)):
            p.grad_dtype = case.dtypes.grad
            if case.dtypes.state or a.state or (case.rule == "RAdam" and i % 2):  # 5 steps are not rectified
                self._prefill(p, a)
        eps = torch.finfo(torch.float64 if case.dtypes.param == torch.float64 else torch.float32).eps
        of_rows = case.options.get("centralize") or case.ours.rule.row_state
        self.rounding = (64 if of_rows else 16) * eps

    def _own(self, p: torch.Tensor) -> dict[str, Any]:
        """Options of a parameter's own group."""
        limit = self.case.options.get("max_row_norm")
        return {"max_row_norm": limit * math.sqrt(max(1, p[:1].numel()))} if limit and p.ndim else {}

    def _prefill(self, p: torch.nn.Parameter, a: Arrangement) -> None:
        """State as if from earlier steps; positive, whatever it means, and a variance positive too."""
        rule, group = self.case.ours.rule, self.optimizer.param_groups[0]
        dtype = self.case.dtypes.state or self.case.dtypes.param
        names = rule.states[rule.variant(group)]
        values = {name: 0.5 + torch.rand(a.shape, dtype=torch.float64) for name in names}
        if "grad_avg" in values:
            values["grad_avg"] /= 4
        of_rows = {}
        if rule.row_state:
            wide = torch.promote_types(p.dtype, torch.float32)
            of_rows[rule.row_state] = 0.5 + torch.rand(a.shape[0] if p.ndim > 1 else 1, dtype=wide)
        entry = {k: placed(v, a.state or a.param, dtype, self.device) for k, v in values.items()}
        self.guarded += entry.values()
        entry |= {k: v.to(self.device) for k, v in of_rows.items()}
        if entry and rule.counts:
            entry["step"] = torch.tensor(4.0)
        if entry and rule.product:
            entry[rule.product[0]] = torch.tensor(0.3)
        if entry:
            self.optimizer.state[p].update(entry)

    def state(self, p: torch.nn.Parameter) -> dict[str, Any]:
        return dict(self.optimizer.state.get(p, {}))

    def new_gradients(self) -> None:
        for a, p in zip(self.arrangements, self.params, strict=True):
            p.grad = placed(gradient_values(a.shape), a.grad, self.case.dtypes.grad, self.device)

    def _expected(self, p: torch.nn.Parameter) -> tuple[torch.Tensor, dict[str, Any]]:
        state = {k: v.double() if k != "step" else int(v) for k, v in self.state(p).items()}
        oracle = ORACLES[self.case.rule]
        options = {**self.case.options, **self._own(p)}
        return oracle(p.detach().double(), p.grad.double(), state, **options)

    def step(self, times: int = 1) -> "Trial":
        for _ in range(times):
            self.new_gradients()
            expected = [self._expected(p) for p in self.params]
            gradients = [bits(memory_of(p.grad)) for p in self.params]
            self.optimizer.step()
            for i, (p, (value, state)) in enumerate(zip(self.params, expected, strict=True)):
                what = f"{self.arrangements[i]}"
                assert torch.equal(bits(memory_of(p.grad)), gradients[i]), f"gradient of {what}"
                self._check(p, value, what, *self._of_projection(p))
                assert self.state(p).keys() == state.keys(), what
                for name, stored in self.state(p).items():
                    self._check(stored, state[name], f"{name} of {what}")
        return self

    def _of_projection(self, p: torch.Tensor) -> tuple[int, int]:
        """Roundings of storage, and times those of the arithmetic, that a parameter has."""
        if p.ndim < 2 or not self.case.options.get("max_row_norm"):
            return 1, 1
        written_first = self.backend == "numba" or (self.backend == "triton" and p[:1].numel() > 4096)
        return (3 if written_first else 1), 5

    def _check(
        self, actual: torch.Tensor, expected: Any, what: str, stored: int = 1, computed: int = 1
    ) -> None:
        if not isinstance(expected, torch.Tensor):
            assert actual.item() == expected, what
            return
        half = torch.finfo(actual.dtype).eps / 2
        error = (actual.detach().double() - expected).abs()
        excess = error - (expected.abs() * stored * half + computed * self.rounding)
        assert (excess <= 0).all(), f"{what}: off by {error.max()}"  # also if it is NaN
        if any(actual is t for t in self.guarded):
            assert_untouched_around(actual.detach())
