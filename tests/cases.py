"""Shapes, dtypes and tolerances: the one list that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: x's dtype and the adapters' dtype, as layers meet them.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]

#: Largest relative Frobenius error against float64 on the same stored values, by the dtype of the result.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@dataclass(frozen=True)
class Case:
    """One call of a layer: leading sizes of x, in- and out-features, the adapters' ranks."""

    lead: tuple[int, ...]
    inputs: int
    outputs: int
    ranks: tuple[int, ...]
    dropout_p: float = 0.0

    def __str__(self) -> str:
        lead = "x".join(map(str, self.lead)) or "scalar"
        return f"{lead}-{self.inputs}-{self.outputs}-r{','.join(map(str, self.ranks))}-p{self.dropout_p}"


CASES = [
    Case((5,), 7, 9, (3,)),
    Case((1,), 1, 1, (1,)),
    Case((0,), 8, 8, (4,)),
    Case((3,), 16, 0, (4,)),
    Case((40,), 0, 1, (1, 1)),
    Case((2, 64), 127, 129, (8,)),
    Case((127,), 129, 127, (1, 3)),
    Case((129,), 64, 256, (8, 3, 1)),
    Case((2, 3, 4), 33, 65, (64,)),
    Case((40,), 96, 80, (16,) * 4),
    Case((1,), 300, 200, (1, 2, 3, 4, 5, 6, 7, 8)),
    Case((200,), 513, 130, (16, 8), 0.1),
    Case((2, 65), 127, 129, (3, 8, 1), 0.5),
    Case((1,), 129, 64, (4,), 0.9),
]


@dataclass
class Arguments:
    """Tensors of a case, with values of about unit size."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    base: Tensor
    grad: Tensor
    A: list[Tensor]
    B: list[Tensor]
    scaling: list[float]
    dropout_p: float
    rng: Tensor | None

    def to(self, dtype: torch.dtype) -> Arguments:
        """The same values in another dtype, as leaves that require grad where these do."""

        def cast(value):
            if isinstance(value, list):
                return [cast(item) for item in value]
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().to(dtype).requires_grad_(value.requires_grad)
            return value

        return Arguments(**{name: cast(value) for name, value in vars(self).items()})


def arguments(case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype, seed: int = 0, device="cpu") -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int, of: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=generator, dtype=torch.float64) * scale).to(device, of)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.requires_grad_()

    inputs, outputs = case.inputs, case.outputs
    fan_in = max(inputs, 1) ** -0.5
    return Arguments(
        x=leaf(normal(*case.lead, inputs)),
        weight=normal(outputs, inputs, scale=fan_in),
        bias=normal(outputs),
        base=leaf(normal(*case.lead, outputs)),
        grad=normal(*case.lead, outputs),
        A=[leaf(normal(r, inputs, of=adapter_dtype, scale=fan_in)) for r in case.ranks],
        B=[leaf(normal(outputs, r, of=adapter_dtype, scale=r**-0.5)) for r in case.ranks],
        scaling=[2.0 / (k + 1) for k in range(len(case.ranks))],
        dropout_p=case.dropout_p,
        rng=torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator).to(device) if case.dropout_p else None,
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN never passes as small."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.numel() == 0:
        return 0.0
    scale = expected.norm().clamp_min(1e-30)
    return float((actual - expected).norm() / scale)


@dataclass(frozen=True)
class ExpertCase:
    """One call on the experts of a mixture: rows of each expert, rows of none after them, features, ranks."""

    counts: tuple[int, ...]
    rest: int
    inputs: int
    outputs: int
    ranks: tuple[int, ...]
    dropout_p: float = 0.0
    #: B as a view of [O, r E] with the expert's index running fastest, and A as one of [E r, I], as PEFT keeps them.
    peft: bool = True

    @property
    def rows(self) -> int:
        return sum(self.counts) + self.rest

    def __str__(self) -> str:
        counts = ",".join(map(str, self.counts))
        layout = "peft" if self.peft else "plain"
        return f"{counts}+{self.rest}-{self.inputs}-{self.outputs}-r{','.join(map(str, self.ranks))}-p{self.dropout_p}-{layout}"


EXPERT_CASES = [
    ExpertCase((3, 0, 5), 0, 7, 9, (3,)),
    ExpertCase((1,), 0, 1, 1, (1,)),
    ExpertCase((0, 0), 0, 8, 8, (4,)),
    ExpertCase((), 3, 8, 6, (2,)),
    ExpertCase((0, 0, 0), 5, 16, 9, (2, 1)),
    ExpertCase((3, 2), 1, 16, 0, (4,)),
    ExpertCase((3, 2), 0, 0, 5, (1, 1)),
    ExpertCase((127, 1, 0, 129), 4, 64, 96, (8, 3)),
    ExpertCase((0, 300, 0), 0, 127, 129, (8,), peft=False),
    ExpertCase((1,) * 4 + (0,) * 14, 0, 300, 200, (1, 2, 3, 4, 5)),
    ExpertCase((50,) * 20, 7, 33, 65, (16,)),
    ExpertCase((60, 0, 40), 3, 513, 130, (16, 8), 0.1),
    ExpertCase((9, 30), 2, 128, 256, (3, 8, 1), 0.5, peft=False),
    ExpertCase((40, 300), 0, 64, 320, (64,)),
]


@dataclass
class ExpertArguments:
    """Tensors of an expert case; ``factors`` are the leaves of which A and B are views."""

    base: Tensor
    x: Tensor
    ends: Tensor
    factors: list[Tensor]
    A: list[Tensor]
    B: list[Tensor]
    scaling: list[float]
    dropout_p: float
    rng: Tensor | None
    grad: Tensor

    def exact(self) -> ExpertArguments:
        """The same values in float64, as leaves of their own."""

        def wide(tensor: Tensor) -> Tensor:
            return tensor.detach().double().requires_grad_()

        A, B = [wide(a) for a in self.A], [wide(b) for b in self.B]
        return replace(self, base=wide(self.base), x=wide(self.x), grad=self.grad.double(), A=A, B=B, factors=[*A, *B])


def expert_arguments(
    case: ExpertCase, dtype: torch.dtype, adapter_dtype: torch.dtype, seed: int = 0, device="cpu"
) -> ExpertArguments:
    """Values of about unit size; ``exact()`` has them in float64."""
    generator = torch.Generator().manual_seed(seed)
    experts, inputs, outputs = len(case.counts), case.inputs, case.outputs

    def normal(*sizes: int, of: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=generator, dtype=torch.float64) * scale).to(of)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(device).requires_grad_()

    fan_in = max(inputs, 1) ** -0.5
    x, base, grad = (normal(case.rows, n, of=dtype) for n in (inputs, outputs, outputs))
    factors, A, B = [], [], []
    for r in case.ranks:
        a = normal(experts * r, inputs, of=adapter_dtype, scale=fan_in)
        b = normal(outputs, r, experts, of=adapter_dtype, scale=max(r, 1) ** -0.5)
        if case.peft:
            a, b = leaf(a), leaf(b.reshape(outputs, r * experts))
            A.append(a.view(experts, r, inputs))
            B.append(b.view(outputs, r, experts).permute(2, 0, 1))
        else:
            a = leaf(a.reshape(experts, r, inputs))
            b = leaf(b.permute(2, 0, 1).contiguous())
            A.append(a)
            B.append(b)
        factors += [a, b]
    return ExpertArguments(
        base=leaf(base),
        x=leaf(x),
        ends=torch.tensor(case.counts, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32),
        factors=factors,
        A=A,
        B=B,
        scaling=[2.0 / (k + 1) for k in range(len(case.ranks))],
        dropout_p=case.dropout_p,
        rng=torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator).to(device) if case.dropout_p else None,
        grad=grad.to(device),
    )
