"""Hostile calls of every operation, at random: python tests/fuzz_ops.py SEED FIRST COUNT [FILE].

Call number i of a seed is always the same call. Before each, its number is written to FILE, so that whoever started this
process knows which call ended it. A call may do one of two things: raise an error that names the operation, or return
what the reference returns. Anything else is printed, and the exit status is 1.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import resource
import sys
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tsugi_kpool import ops, reference

#: Address space beyond what the process has after its imports: what asks for more gets an error.
ROOM = 4 << 30
#: Sizes that no memory holds.
HUGE = (2**45, 2**61, 2**62, 2**63 - 1)
DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)
FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
PUBLIC = ops.OPERATIONS
INTERNAL = ("_lora_apply", "_lora_backward", "_lora_experts_apply", "_lora_experts_backward")
WRITTEN = {
    "lora_expand_": ("y",),
    "sideband_accumulate_": ("sum", "stats", "grad"),
    "sideband_drain_": ("sum", "stats", "grad"),
}


class Plain(Tensor):
    """A subclass that changes nothing."""


class Wrapper(Tensor):
    """A subclass without memory, which takes no operation."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} of a Wrapper")


# ---- good arguments ------------------------------------------------------------------------------------------------


class Arguments:
    """Arguments that fit together, by name, for one operation."""

    def __init__(self, dice: random.Random, op: str):
        self.dice, self.generator = dice, torch.Generator().manual_seed(dice.getrandbits(48))
        self.values = getattr(self, "of_" + op.strip("_").split("_")[0])(op)

    def normal(self, *sizes, dtype=torch.float32) -> Tensor:
        return torch.randn(sizes, generator=self.generator).to(dtype)

    def of_lora(self, op):
        if "experts" in op:
            return self.of_experts(op)
        dice, normal = self.dice, self.normal
        lead = [dice.choice((0, 1, 2, 3, 7, 40)) for _ in range(dice.choice((1, 1, 2, 3)))]
        inputs, outputs = dice.choice((0, 1, 5, 16, 33)), dice.choice((0, 1, 4, 16, 40))
        ranks = [dice.choice((1, 2, 4, 8)) for _ in range(dice.choice((1, 1, 2, 3)))]
        dtype = dice.choice(FLOATS)
        wide = torch.promote_types(dtype, dice.choice((dtype, torch.float32)))
        p = dice.choice((0.0, 0.0, 0.0, 0.3))
        values = {
            "x": normal(*lead, inputs, dtype=dtype),
            "y": normal(*lead, outputs, dtype=dtype),
            "base": normal(*lead, outputs, dtype=dtype),
            "grad": normal(*lead, outputs, dtype=dtype),
            "h": normal(*lead, sum(ranks), dtype=wide),
            "weight": normal(outputs, inputs, dtype=dtype),
            "bias": dice.choice((None, normal(outputs, dtype=dtype))),
            "A": [normal(r, inputs, dtype=wide) for r in ranks],
            "B": [normal(outputs, r, dtype=wide) for r in ranks],
            "scaling": [dice.choice((1.0, 0.5, -2.0)) for _ in ranks],
            "dropout_p": p,
            "rng": torch.tensor([dice.getrandbits(40), 3]) if p else None,
            "need_x": dice.random() < 0.6,
            "need_A": dice.random() < 0.6,
            "need_B": dice.random() < 0.6,
        }
        return {name: values[name] for name in parameters(op)}

    def of_experts(self, op):
        dice, normal = self.dice, self.normal
        counts = [dice.choice((0, 1, 2, 7, 60)) for _ in range(dice.choice((0, 1, 2, 5)))]
        rows = sum(counts) + dice.choice((0, 0, 3))
        inputs, outputs = dice.choice((0, 1, 5, 16, 33)), dice.choice((0, 1, 4, 16, 40))
        ranks = [dice.choice((1, 2, 4, 8)) for _ in range(dice.choice((1, 1, 2, 3)))]
        dtype = dice.choice(FLOATS)
        wide = torch.promote_types(dtype, dice.choice((dtype, torch.float32)))
        p, experts, peft = dice.choice((0.0, 0.0, 0.0, 0.3)), len(counts), dice.random() < 0.5
        B = [normal(outputs, r, experts, dtype=wide).permute(2, 0, 1) for r in ranks]
        values = {
            "base": normal(rows, outputs, dtype=dtype),
            "x": normal(rows, inputs, dtype=dtype),
            "grad": normal(rows, outputs, dtype=dtype),
            "h": normal(rows, sum(ranks), dtype=wide),
            "ends": torch.tensor(counts, dtype=torch.int64).cumsum(0),
            "A": [normal(experts, r, inputs, dtype=wide) for r in ranks],
            "B": B if peft else [b.contiguous() for b in B],
            "scaling": [dice.choice((1.0, 0.5, -2.0)) for _ in ranks],
            "dropout_p": p,
            "rng": torch.tensor([dice.getrandbits(40), 3]) if p else None,
            "need_x": dice.random() < 0.6,
            "need_A": dice.random() < 0.6,
            "need_B": dice.random() < 0.6,
        }
        if dice.random() < 0.5:
            values["ends"] = values["ends"].to(torch.int32)
        return {name: values[name] for name in parameters(op)}

    def of_sideband(self, op):
        dice = self.dice
        shapes = [dice.choice(((3,), (4, 5), (0,), (700,), ())) for _ in range(dice.choice((1, 2, 3)))]
        values = {
            "sum": [self.normal(*shape) for shape in shapes],
            "stats": torch.tensor([2.0, 3.0, 5.0, 900.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64),
            "grad": [self.normal(*shape, dtype=dice.choice(FLOATS)) for shape in shapes],
            "weight": dice.choice((1.0, 2.5)),
            "zero_grad": dice.random() < 0.5,
            "scale": 0.25,
        }
        return {name: values[name] for name in parameters(op)}

    def of_buffer(self, op):
        window = self.dice.choice((1, 2, 5))
        numel = self.dice.choice((1, 30, 1500))
        ring = self.normal(window, numel, dtype=self.dice.choice(FLOATS))
        return {"ring": ring, "filled": self.dice.randint(0, window)}


def parameters(op: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.tsugi, op).default._schema.arguments]


# ---- what makes them hostile -----------------------------------------------------------------------------------------


def other_dtype(t: Tensor, dice) -> Tensor:
    dtype = dice.choice(DTYPES)
    try:
        return t.to(dtype)
    except (RuntimeError, NotImplementedError):
        return torch.empty(t.shape, dtype=dtype)


def freed(t, dice):
    t = t.clone()
    t.untyped_storage().resize_(dice.choice((0, t.untyped_storage().nbytes() // 2)))
    return t


def set_elsewhere(t, dice):
    """A tensor that claims memory beyond the storage it was given."""
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() + 64)
    t = t.as_strided(t.shape, t.stride(), 64 // t.element_size())
    t.untyped_storage().resize_(max(t.untyped_storage().nbytes() - 64, 0))
    return t


def misaligned(t, dice):
    """At an odd address. Made of bytes: torch's own copy may end the process at such an address."""
    if t.dtype not in FLOATS:
        return t
    values = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(bytearray(b"\0" + values), dtype=t.dtype, offset=1, count=t.numel()).view(t.shape)


def lazily_negative(t, dice):
    if t.dtype in (torch.float32, torch.float64) and dice.random() < 0.5:
        return torch.complex(torch.zeros_like(t), -t).conj().imag
    return torch._neg_view(-t)


def strided(t, dice):
    return t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t


def transposed(t, dice):
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t


def expanded(t, dice):
    return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t


def overlapping(t, dice):
    if t.dim() != 2:
        return expanded(t, dice)
    steps = dice.choice(((3, 1), (1, 1), (1, 3), (0, 2), (2, 2)))
    return torch.zeros(4 * (t.shape[0] + t.shape[1]) + 1, dtype=t.dtype).as_strided(t.shape, steps)


def in_a_buffer(t, dice):
    """Columns of a wider buffer."""
    if t.dim() != 2:
        return t
    out = torch.zeros(t.shape[0], t.shape[1] + 9, dtype=t.dtype)[:, 4 : 4 + t.shape[1]]
    return out.copy_(t)


def huge(t, dice):
    shape = list(t.shape) or [1]
    shape[dice.randrange(len(shape))] = dice.choice(HUGE)
    return t.new_zeros(()).expand(shape)


def empty_and_huge(t, dice):
    return t.new_empty((0, *[dice.choice(HUGE) for _ in range(dice.choice((1, 2, 3)))]))


def wide_strides(t, dice):
    return t.new_empty(0).as_strided((0, 3), (dice.choice(HUGE), dice.choice(HUGE)))


def wrapper(t, dice):
    return Tensor._make_wrapper_subclass(Wrapper, t.shape, dtype=t.dtype)


def lazily_zero(t, dice):
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


def dual(t, dice):
    return torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))


def inferred(t, dice):
    with torch.inference_mode():
        return t.clone()


def fake(t, dice):
    return FakeTensorMode().from_tensor(t)


LAYOUTS = (misaligned, lazily_negative, strided, transposed, in_a_buffer, expanded, inferred)
TENSOR_CHANGES = (
    *LAYOUTS * 2,
    *(other_dtype, freed, set_elsewhere, overlapping, huge, empty_and_huge, wide_strides, wrapper, lazily_zero, fake),
    lambda t, dice: t.to_sparse(),
    lambda t, dice: t.to_sparse_csr(),
    lambda t, dice: t.to_mkldnn(),
    lambda t, dice: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    lambda t, dice: torch.nested.nested_tensor([t, t]),
    lambda t, dice: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    lambda t, dice: t.to("meta"),
    lambda t, dice: t.as_subclass(Plain),
    lambda t, dice: torch.nn.Parameter(t),
    lambda t, dice: t.unsqueeze(0),
    lambda t, dice: t.flatten(),
    lambda t, dice: t[..., :-1],
    lambda t, dice: t.new_tensor(1.0),
    lambda t, dice: t * float("nan"),
    lambda t, dice: t.detach().requires_grad_(),
    lambda t, dice: None,
    lambda t, dice: dice.choice(("x", 3, 1.5, [t], (), {}, t.tolist(), object())),
)
OTHER_VALUES = (
    None,
    "a",
    -1,
    0,
    1,
    2**62,
    -(2**63),
    2**64,
    0.5,
    -0.5,
    1.0,
    float("nan"),
    float("inf"),
    True,
    [],
    [1.0],
    (2, 3),
)


def change(values: dict, dice: random.Random) -> None:
    """One argument becomes something else."""
    name = dice.choice(list(values))
    value = values[name]
    tensors = places(values)
    kind = dice.random()
    if kind < 0.15 and len(tensors) > 1:
        # Two arguments of one memory.
        (to, to_index), (source, index) = dice.sample(tensors, 2)
        put(values, to, to_index, shared(get(values, source, index), get(values, to, to_index), dice))
    elif isinstance(value, Tensor):
        values[name] = attempt(dice.choice(TENSOR_CHANGES), value, dice)
    elif isinstance(value, list) and value and isinstance(value[0], Tensor) and kind < 0.8:
        k = dice.randrange(len(value))
        values[name] = [attempt(dice.choice(TENSOR_CHANGES), t, dice) if i == k else t for i, t in enumerate(value)]
    elif isinstance(value, list) and value:
        values[name] = dice.choice(([], value[:-1], value + value[:1], tuple(value), value[0], [*value, None]))
    else:
        values[name] = dice.choice(OTHER_VALUES)


def readable(t: Tensor) -> bool:
    """Whether torch itself survives reading a tensor: it does not look whether its storage was freed or cut, and may
    use instructions that need an address of the element's alignment."""
    odd = t.layout != torch.strided or t.is_nested or type(t) not in (Tensor, Plain, torch.nn.Parameter)
    if odd or t._is_zerotensor() or t.device.type != "cpu" or t.numel() == 0:
        return True
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) + t.storage_offset()
    storage = t.untyped_storage()
    inside = (last + 1) * t.element_size() <= storage.nbytes()
    return inside and storage.data_ptr() % t.element_size() == 0


def places(values: dict) -> list[tuple[str, int | None]]:
    """Where tensors stand: an argument's name, and the index in its list."""
    alone = [(name, None) for name, value in values.items() if isinstance(value, Tensor)]
    lists = [(name, value) for name, value in values.items() if isinstance(value, list)]
    return alone + [(name, k) for name, value in lists for k, t in enumerate(value) if isinstance(t, Tensor)]


def attempt(alter, value, dice):
    """Not every change can be made to every tensor; then it stays as it is. What is odd already is changed no further:
    torch itself does not survive copying some of it."""
    plain = type(value) in (Tensor, Plain, torch.nn.Parameter) and value.layout == torch.strided and not value.is_nested
    if not plain or not readable(value) or value._is_zerotensor() or value.device.type != "cpu":
        return value
    if max(value.shape, default=1) > 10**6:  # a sparse layout of many rows takes torch minutes
        return value
    try:
        return alter(value, dice)
    except Exception:
        return value


def get(values, name, index):
    return values[name] if index is None else values[name][index]


def put(values, name, index, value):
    if index is None:
        values[name] = value
    else:
        values[name] = [value if k == index else t for k, t in enumerate(values[name])]


def shared(source: Tensor, like: Tensor, dice) -> Tensor:
    """A view of source's memory: itself, or with the shape of `like`, from a random element on."""
    if dice.random() < 0.4:
        return source
    try:
        room = source.untyped_storage().nbytes() // source.element_size() - like.numel()
        return source.as_strided(like.shape, like.stride(), dice.randint(0, max(room, 0)))
    except (RuntimeError, NotImplementedError, ValueError):
        return source


# ---- a call ----------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    op: str
    values: dict
    public: bool
    mode: str
    changes: int

    def __str__(self) -> str:
        def describe(value):
            if isinstance(value, Tensor):
                try:
                    return f"{value.dtype}{[*value.shape]} {value.layout} strides {value.stride()}"
                except Exception as error:
                    return f"{type(value).__name__} ({error})"
            if isinstance(value, (list, tuple)):
                return "[" + ", ".join(map(describe, value)) + "]"
            return repr(value)[:60]

        where = "ops" if self.public else "torch.ops.tsugi"
        arguments = ", ".join(f"{name}={describe(value)}" for name, value in self.values.items())
        return f"{where}.{self.op}({arguments}) under {self.mode}, {self.changes} changes"


MODES = {
    "no mode": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "FakeTensorMode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "dual_level": torch.autograd.forward_ad.dual_level,
    "vmap": contextlib.nullcontext,
    "functional_call": contextlib.nullcontext,
}


#: Modes in which torch's own operations read the arguments; of memory that is not there they end the process.
TORCH_READS = ("autocast", "dual_level", "vmap")


def make(seed: int, index: int) -> Call:
    dice = random.Random(f"{seed}:{index}")
    op = dice.choice((*PUBLIC, *PUBLIC, *INTERNAL))
    public = op in PUBLIC and dice.random() < 0.5
    if op == "_lora_apply":
        source = dice.choice(("lora_linear", "lora_delta"))
        values = {name: None for name in parameters(op)} | Arguments(dice, source).values
        values = {name: values[name] for name in parameters(op)}
    else:
        values = Arguments(dice, op).values
    changes = dice.choice((0, 1, 1, 1, 2, 3))
    for _ in range(changes):
        change(values, dice)
    mode = "no mode" if dice.random() < 0.6 else dice.choice(list(MODES))
    if changes > 1 and not all(map(readable, flat(list(values.values())))):
        # Such memory stands alone: where torch refuses the kinds of a call's arguments it prints all of them, and so
        # reads them.
        values = Arguments(dice, op).values if op != "_lora_apply" else values | Arguments(dice, source).values
        name, index = dice.choice(places(values))
        put(values, name, index, attempt(dice.choice((freed, misaligned)), get(values, name, index), dice))
        changes = 1
    if mode in TORCH_READS and not all(map(readable, flat(list(values.values())))):
        mode = "no mode"
    return Call(op, values, public, mode, changes)


def run(call: Call):
    function = getattr(ops, call.op) if call.public else getattr(torch.ops.tsugi, call.op).default
    # By position, as what comes by a wrong name is Python's matter.
    arguments = list(call.values.values())
    with MODES[call.mode]():
        if call.mode == "dual_level":
            first = next((i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.is_floating_point()), None)
            if first is not None:
                arguments[first] = attempt(dual, arguments[first], None)
        if call.mode == "vmap":
            small = [type(a) is Tensor and readable(a) and a.numel() < 10**6 for a in arguments]
            arguments = [torch.stack([a, a]) if is_small else a for a, is_small in zip(arguments, small)]
            axes = tuple(0 if is_small else None for is_small in small)
            return torch.vmap(function, in_dims=axes)(*arguments)
        if call.mode == "functional_call":
            module = torch.nn.Module()
            module.forward = function
            return torch.func.functional_call(module, {}, tuple(arguments))
        return function(*arguments)


# ---- what is right ---------------------------------------------------------------------------------------------------


def copied(value):
    """The same values in memory of their own."""
    if isinstance(value, Tensor):
        if not readable(value) or value.numel() > 10**7:
            raise ValueError("cannot be copied")
        return value.detach().clone().resolve_neg().resolve_conj().contiguous().as_subclass(Tensor)
    return [copied(v) for v in value] if isinstance(value, (list, tuple)) else value


def expected(op: str, values: dict):
    """The reference's result, followed by what it wrote."""
    if op == "_lora_apply":
        shared = [values[name] for name in ("A", "B", "scaling", "dropout_p", "rng")]
        h = reference.lora_shrink(values["x"], values["A"], values["dropout_p"], values["rng"])
        if values["weight"] is None:
            return [reference.lora_delta(values["base"], values["x"], *shared), h]
        return [reference.lora_linear(values["x"], values["weight"], values["bias"], *shared), h]
    if op == "_lora_experts_apply":
        return [reference.lora_experts(**values), None]
    if op == "_lora_experts_backward":
        return expert_gradients(**values)
    if op == "_lora_backward":
        values = dict(values)
        needs = [values.pop(name) for name in ("need_x", "need_A", "need_B")]
        # What no wanted gradient needs is not looked at.
        lead, A = values["grad"].shape[:-1], values["A"]
        if not needs[1]:
            values["x"] = values["grad"].new_zeros(*lead, A[0].shape[1])
        if not needs[2]:
            values["h"] = A[0].new_zeros(*lead, sum(a.shape[0] for a in A))
        results = reference.lora_backward(**values)
        return [result if need else None for result, need in zip(results, needs)]
    if op == "sideband_stats" and not values["stats"].isfinite().all():
        # Statistics that are no numbers: infinite variance and no signal here, whatever comes out there.
        return [None]
    # Torch's scalars end at 64 bits.
    values = {name: float(v) if name in ("weight", "scale") and isinstance(v, int) else v for name, v in values.items()}
    function = getattr(reference, op)
    result = function(*list(values.values())[: len(inspect.signature(function).parameters)])
    return [result, *(values[name] for name in WRITTEN.get(op, ()))]


def expert_gradients(grad, x, h, ends, A, B, scaling, dropout_p, rng, need_x, need_A, need_B):
    """The gradients of ``lora_experts`` that are wanted; what no wanted gradient needs is not looked at."""
    dtype, ranks = torch.promote_types(grad.dtype, A[0].dtype), [a.shape[1] for a in A]
    dh = reference.experts_grad_h(grad, ends, B, scaling, dtype)
    dx = reference.experts_grad_x(dh, ends, A, dropout_p, rng).to(grad.dtype) if need_x else None
    dA = reference.experts_grad_A(dh, x, ends, ranks, A[0].dtype, dropout_p, rng) if need_A else None
    dB = reference.experts_grad_B(grad, h.to(dtype), ends, ranks, B[0].dtype, scaling) if need_B else None
    return [dx, dA, dB]


def flat(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in flat(item)] if isinstance(value, (list, tuple)) else []


def differ(actual, wanted) -> str | None:
    for got, want in zip(actual, wanted):
        if want is None:
            continue
        for g, w in zip(flat(got), flat(want), strict=True):
            if g.shape != w.shape:
                return f"shapes {[*g.shape]} and {[*w.shape]}"
            tolerance = (
                3e-2 if torch.bfloat16 in (g.dtype, w.dtype) else 6e-3 if torch.float16 in (g.dtype, w.dtype) else 2e-4
            )
            g, w = g.detach().double(), w.detach().double()
            size = w.nan_to_num(0, 0, 0).abs().max().item() if w.numel() else 0.0
            if not torch.allclose(g, w, rtol=tolerance, atol=tolerance * (1 + size), equal_nan=True):
                return f"values, by up to {(g - w).abs().max().item():.2e} of {size:.2e}"
    return None


#: Errors that torch raises before or after the operation.
TORCHS_OWN = (
    "Wrapper",
    "Named tensors",
    "Inference tensors cannot be saved",
    "can't allocate memory",
    "not implemented for '",
    "UnknownQuantizer",
    "NestedTensorImpl",
)
#: Where the call itself goes through torch's transforms, the error is theirs.
THEIRS = ("vmap", "dual_level", "FakeTensorMode")


def verdict(call: Call) -> tuple[bool, str | None]:
    """Whether the call returned, and what is wrong with what it did."""
    try:
        before = {name: copied(value) for name, value in call.values.items()}
    except Exception:  # not every hostile tensor can be copied
        before = None
    try:
        result = run(call)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        text = str(error)
        op = call.op.strip("_")
        names = (
            op in text
            or "tsugi::" in text
            or (op == "lora_apply" and ("lora_linear" in text or "lora_delta" in text))
            or (op.startswith("lora_experts") and "lora_experts" in text)
        )
        names = names or call.mode in THEIRS or any(part in text for part in TORCHS_OWN)
        if call.changes == 0 and call.mode in ("no mode", "no_grad", "inference_mode"):
            return False, f"a good call was refused: {error}"
        return False, None if names else f"{type(error).__name__} names no operation: {text[:300]}"
    except Exception as error:
        if call.mode in THEIRS or "fake" in str(error).lower():
            return False, None
        return False, f"{type(error).__name__}: {str(error)[:300]}"
    if before is None or call.mode in ("autocast", *THEIRS):
        return True, None
    if any(isinstance(t, FakeTensor) or t.device.type == "meta" for t in flat([result, list(call.values.values())])):
        return True, None
    try:
        with torch.no_grad():
            wanted = expected(call.op, before)
    except Exception as error:
        # torch's: about the strides of an empty tensor, and memory for a gradient that nobody asked us for
        if "invalid storage offset" in str(error) or "can't allocate memory" in str(error):
            return True, None
        return True, f"returned, but the reference says {type(error).__name__}: {str(error)[:300]}"
    actual = list(result) if call.op.startswith("_lora") else [result]
    what = differ([*actual, *(call.values[name] for name in WRITTEN.get(call.op, ()))], wanted)
    return True, what and f"other results than the reference: {what}"


def main(seed: int, first: int, count: int, journal: str | None) -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    record = os.open(journal, os.O_CREAT | os.O_WRONLY) if journal else None
    returned = wrong = 0
    for index in range(first, first + count):
        if record is not None:
            os.pwrite(record, b"%12d" % index, 0)
        call = make(seed, index)
        begin = time.monotonic()
        came_back, what = verdict(call)
        returned += came_back
        seconds = time.monotonic() - begin
        if what is None and seconds > 60:
            what = f"took {seconds:.0f} s"
        if what is not None:
            wrong += 1
            print(f"seed {seed} call {index}: {call}\n    {what}", flush=True)
    print(f"seed {seed}: {count} calls, {returned} returned, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:4]), sys.argv[4] if len(sys.argv) > 4 else None))
