"""Fingerprints: 64 bits that tell one tensor's bits from another's, computed where the tensor is.

The tensor's bytes are read as 32-bit words x_k and summed as x_k w_k modulo 2^64, w_k odd and mixed from the place k. A
sum of integers has the same bits in whatever order a device adds, and with an odd factor every change of a single word shows.
Two different tensors have the same fingerprint only by chance: about once in 2^33 if only signs differ, which is the worst
case, and less often otherwise. A fingerprint is no protection against somebody who looks for a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["adapter_fingerprint", "as_record_field", "fingerprint"]

_ROW = 4096  # words that share a factor
# Words that are looked at together, so that no whole tensor is copied: 1 MB of products, which a processor's cache holds,
# and 128 MB where a device has thousands of threads to keep busy. The fingerprint does not depend on it.
_CHUNK_CPU, _CHUNK = 32 * _ROW, 4096 * _ROW
# Words of 32 bits and not of 64: the top bits of two words of 64 would cancel each other.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def fingerprint(tensor: Tensor) -> Tensor:
    """64 bits of a dense tensor, an int64 scalar on its device; nothing is read back to the host.

    Of any dtype and layout with strides; a tensor that is not contiguous is copied for it.

    Raises:
        RuntimeError, NotImplementedError, TypeError: a tensor whose bytes cannot be read: meta, sparse, of a subclass.
    """
    flat = _plain(tensor.detach()).contiguous().flatten()
    size = next(size for size in (4, 2, 1) if flat.numel() * flat.element_size() % size == 0)
    if flat.element_size() > size:  # elements of 8 bytes
        flat = flat.view(_WORDS[size])
    chunk = _CHUNK_CPU if flat.device.type == "cpu" else _CHUNK
    elements = chunk * size // flat.element_size()
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, start in enumerate(range(0, flat.numel(), elements)):
        words = _words(flat[start : start + elements], size)
        total += _weighted_sum(words, first_row=number * (chunk // _ROW))
    return total


def adapter_fingerprint(parameters: Sequence[Tensor]) -> Tensor:
    """64 bits of many small tensors together, an int64 scalar; by one copy of them all instead of a pass over each."""
    total = torch.zeros((), dtype=torch.int64, device=parameters[0].device)
    for number, dtype in enumerate(dict.fromkeys(p.dtype for p in parameters)):
        together = torch.cat([p.detach().flatten() for p in parameters if p.dtype == dtype])
        total += _mixed(number) * fingerprint(together)
    return total


def as_record_field(value: Tensor) -> Tensor:
    """48 of the 64 bits, as a float64 scalar, which holds them exactly."""
    value = value ^ (value >> 32)  # what only the top bits knew, the lower ones know too
    return (value & (2**48 - 1)).double()


def _plain(tensor: Tensor) -> Tensor:
    if tensor.is_quantized:
        return tensor.int_repr()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()


def _words(flat: Tensor, size: int) -> Tensor:
    if flat.storage_offset() * flat.element_size() % size:  # a view of larger words needs an aligned start
        flat = flat.clone()
    return flat.view(_WORDS[size])


def _weighted_sum(words: Tensor, first_row: int) -> Tensor:
    columns = _columns(words.device)
    whole = words.numel() - words.numel() % _ROW
    sums = (words[:whole].view(-1, _ROW) * columns).sum(1)
    rest = (words[whole:] * columns[: words.numel() - whole]).sum()
    sums = torch.cat((sums, rest.reshape(1)))
    return (sums * _mixed_many(sums.numel(), first_row, words.device)).sum()


@lru_cache(maxsize=32)
def _columns(device: torch.device) -> Tensor:
    return _mixed_many(_ROW, 2**50, device)  # other places than any row's


def _mixed_many(count: int, first: int, device: torch.device) -> Tensor:
    """int64 [count]: odd numbers without a pattern, of the places from ``first`` on (SplitMix64, see NOTICE)."""
    x = torch.arange(first, first + count, device=device) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return (x ^ ((x >> 31) & (2**33 - 1))) | 1


@lru_cache(maxsize=4096)
def _mixed(place: int) -> int:
    return int(_mixed_many(1, place + 2**40, torch.device("cpu")))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
