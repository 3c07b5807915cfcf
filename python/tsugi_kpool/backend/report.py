"""What ``use_backend`` returns: for each LoRA layer, who computes it and why, as an object, as text and as HTML."""

from __future__ import annotations

import html
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import nn

__all__ = ["BackendReport", "LayerReport", "Seen"]


@dataclass(frozen=True)
class LayerReport:
    """One LoRA layer: who computes it as things stand, and its calls so far."""

    name: str
    kind: str  # PEFT's class, e.g. "lora.Linear"
    in_features: int | None
    out_features: int | None
    adapters: int  # N on this layer
    active: int  # K
    ranks: tuple[int, ...]  # r of each active adapter; of all of them when none is active
    op: str | None  # "lora_linear", "lora_delta", "lora_experts", or None: left to PEFT
    reason: str  # why it is left to PEFT, or why it has nothing to do now; empty otherwise
    parameter: str | None = None  # of lora.ParamWrapper: the one that it adapts
    fast_calls: int = 0
    fallback_calls: dict[str, int] = field(default_factory=dict)  # reason -> calls that ran PEFT's forward

    @property
    def accelerated(self) -> bool:
        return self.op is not None


class Calls(Protocol):
    """The counters that a swapped layer carries."""

    shared: bool  # by all layers that use_backend() without a model has swapped
    linear: int
    delta: int
    experts: int
    fallback: Counter[str]


def _fast(calls: Calls) -> int:
    return calls.linear + calls.delta + calls.experts


@dataclass(frozen=True)
class Seen:
    """One of PEFT's layers as a look at the model found it."""

    layer: LayerReport
    is_lora: bool
    calls: Calls | None

    def with_calls(self) -> LayerReport:
        calls = self.calls
        if calls is None or calls.shared:
            return self.layer
        return replace(self.layer, fast_calls=_fast(calls), fallback_calls=dict(calls.fallback))


class BackendReport:
    """What ``use_backend`` did, live: each access looks at the model as it is.

    ``print(report)`` shows a table of like layers, and so does a notebook's cell that ends in it. As a context manager
    it puts the model back on exit to what it was before the call; the report then keeps the last state it saw. It does
    not keep the model alive.
    """

    def __init__(
        self,
        model: nn.Module | None,
        backend: str,
        look: Callable[[nn.Module], list[Seen]],
        undo: Callable[[], None],
        calls: Calls | None = None,
    ):
        self.backend = backend
        self._model = None if model is None else weakref.ref(model)
        self._look_at = look
        self._undo = undo
        self._calls = calls  # of use_backend() without a model
        self._open = model is not None
        self._seen: list[Seen] = []
        self._look()

    def _look(self) -> None:
        model = self._model() if self._model is not None and self._open else None
        if model is not None:
            self._seen = self._look_at(model)

    @property
    def layers(self) -> list[LayerReport]:
        """Each LoRA layer of the model. Empty for ``use_backend()`` without a model, which counts calls only."""
        self._look()
        return [seen.with_calls() for seen in self._seen if seen.is_lora]

    @property
    def not_lora(self) -> list[LayerReport]:
        """PEFT's layers of other methods (IA3, trained tokens, ...), which are as they were."""
        self._look()
        return [seen.layer for seen in self._seen if not seen.is_lora]

    @property
    def accelerated(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.accelerated]

    @property
    def left_to_peft(self) -> list[LayerReport]:
        return [layer for layer in self.layers if not layer.accelerated]

    @property
    def fast_calls(self) -> int:
        """Layer forwards that ran an op. Calls inside a compiled region are not counted."""
        if self._calls is not None:
            return _fast(self._calls)
        return sum(layer.fast_calls for layer in self.layers)

    @property
    def fallback_calls(self) -> dict[str, int]:
        """Layer forwards that ran PEFT's code instead, by reason."""
        total: Counter[str] = Counter() if self._calls is None else Counter(self._calls.fallback)
        for layer in self.layers:
            total.update(layer.fallback_calls)
        return dict(total.most_common())

    def __enter__(self) -> BackendReport:
        return self

    def __exit__(self, *exc: object) -> None:
        self._look()
        self._seen = [replace(seen, layer=seen.with_calls(), calls=None) for seen in self._seen]
        self._open = False
        self._undo()

    def __repr__(self) -> str:
        return f"<BackendReport {self.backend!r}: {len(self.accelerated)} of {len(self.layers)} layers accelerated>"

    def __str__(self) -> str:
        lines = [self._headline()]
        if rows := _rows(self.layers):
            lines += _aligned([_HEAD, *rows])
        return "\n".join([*lines, *self._footlines()])

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        rows = "".join(_html_row(row, "td") for row in _rows(self.layers))
        table = f"<table><thead>{_html_row(_HEAD, 'th')}</thead><tbody>{rows}</tbody></table>" if rows else ""
        footlines = "<br>".join(html.escape(line.strip()) for line in self._footlines())
        return f"<p>{html.escape(self._headline())}</p>{table}" + (f"<p>{footlines}</p>" if footlines else "")

    def _headline(self) -> str:
        start = f"tsugi_kpool backend {self.backend!r}"
        layers = self.layers
        if self._calls is not None:
            return f"{start} for every LoRA layer created from now on"
        if not layers:
            later = "; those added later stay PEFT's" if self.backend == "peft" else "; those added later are covered"
            return f"{start}: no LoRA layer yet{later}"
        return f"{start}: {sum(layer.accelerated for layer in layers)} of {len(layers)} LoRA layers accelerated"

    def _footlines(self) -> list[str]:
        kinds = Counter(layer.kind for layer in self.not_lora)
        lines = [f"not LoRA, left as it is: {n} x {kind}" for kind, n in kinds.items()]
        fallback = self.fallback_calls
        if self.fast_calls or fallback:
            lines.append(f"calls: {self.fast_calls:,} by tsugi, {sum(fallback.values()):,} by PEFT")
            lines += [f"  {count:,}: {reason}" for reason, count in fallback.items()]
        return lines


# ---- the table -------------------------------------------------------------------------------------------------------

_HEAD = ("layers", "", "kind", "in -> out", "active", "computed by")


def _rows(layers: list[LayerReport]) -> list[tuple[str, ...]]:
    """One row for all layers that differ in nothing but their number in the model."""
    groups: Counter[tuple[str, ...]] = Counter()
    for layer in layers:
        shape = "" if layer.in_features is None else f"{layer.in_features} -> {layer.out_features}"
        ranks = ",".join(map(str, layer.ranks if len(set(layer.ranks)) > 1 else layer.ranks[:1]))
        adapters = f"{layer.active} of {layer.adapters}" + (f", r={ranks}" if ranks else "")
        how = (layer.op or "PEFT") + (f": {layer.reason}" if layer.reason else "")
        name = _pattern(layer.name) + (f" [{layer.parameter}]" if layer.parameter else "")
        groups[name, layer.kind, shape, adapters, how] += 1
    return [(name, f"x{count}", *rest) for (name, *rest), count in groups.items()]


def _pattern(name: str) -> str:
    """A layer's name with numbers as *, without the wrappers that PEFT puts in front."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join("*" if part.isdigit() else part for part in parts)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD) - 1)]
    return [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]).rstrip() for row in rows
    ]


def _html_row(row: tuple[str, ...], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
