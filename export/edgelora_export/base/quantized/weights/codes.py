"""Unpacks codes from words and gives each column the scale of its group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# OCP Microscaling Formats (MX) v1.0, tables 3 and 4: magnitudes of FP6 E2M3 and FP4 E2M1 in the order of their codes
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
E2M3 = np.array([m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)], np.float32)


def unpack_bits(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """Unpacks codes of 1 to 8 bits from a stream whose first code has the lowest bits, along the last axis.

    words: integers of any size (…, W). A code may begin in one word and end in the next. Returns (…, count).

    >>> unpack_bits(np.array([0x87654321], np.uint32), 4, 8).tolist()
    [1, 2, 3, 4, 5, 6, 7, 8]
    """
    octets = np.ascontiguousarray(words.astype(words.dtype.newbyteorder("<"), copy=False)).view(np.uint8)
    periods = -(-count // 8)  # 8 codes fill a whole number of bytes
    needed = periods * bits
    if octets.shape[-1] < needed:
        octets = np.pad(octets, [(0, 0)] * (octets.ndim - 1) + [(0, needed - octets.shape[-1])])
    octets = octets[..., :needed].reshape(*octets.shape[:-1], periods, bits)
    codes = np.empty((*octets.shape[:-1], 8), np.uint8)
    for place in range(8):
        octet, shift = divmod(place * bits, 8)
        codes[..., place] = octets[..., octet] >> shift
        if shift + bits > 8:
            codes[..., place] |= octets[..., octet + 1] << (8 - shift)
    codes &= (1 << bits) - 1
    return codes.reshape(*codes.shape[:-2], periods * 8)[..., :count]


def list_groups(columns: int, size: int) -> NDArray[np.intp]:
    """Lists the group of each column, (K,), where groups of one size follow each other."""
    return np.arange(columns) // size


def scale_groups(
    codes: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any] | None, groups: NDArray[np.intp]
) -> NDArray[np.float32]:
    """Computes (code - zero point) × scale in float32.

    codes: (N, K). scales, zeros: (N, G), or (1, G) for all rows. groups: the group of each column, (K,).
    """
    values = codes.astype(np.float32)
    if zeros is not None:
        values -= zeros.astype(np.float32)[:, groups]
    values *= scales.astype(np.float32)[:, groups]
    return values


def decode_exponents(scales: NDArray[Any]) -> NDArray[Any]:
    """Decodes scales that are stored as exponents in bytes, 2^(byte - 127) (MX v1.0, section 5.4.1). Others stay as they are."""
    return scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32) if scales.dtype == np.uint8 else scales
