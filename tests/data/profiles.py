"""ICC profiles built byte by byte from the specification (ICC.1:2001-12 and ICC.1:2022), and what colours they mean."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]

D50 = (0.9642, 1.0, 0.8249)
# CIE xy of red, green, blue and white
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290))  # IEC 61966-2-1
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290))  # SMPTE EG 432-1, with D65
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), (0.3127, 0.3290))  # Adobe RGB (1998) Color Image Encoding
PROPHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), (0.3457, 0.3585))  # ISO 22028-2
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])

Primaries = tuple[tuple[float, float], ...]


def _xyz(x: float, y: float) -> Array:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def matrix(primaries: Primaries) -> Array:
    """Linear RGB to XYZ under D50 (Bradford), (3, 3)."""
    *colours, white = (_xyz(*place) for place in primaries)
    columns = np.array(colours).T
    unadapted = columns * np.linalg.solve(columns, white)
    gains = (BRADFORD @ D50) / (BRADFORD @ white)
    return np.linalg.inv(BRADFORD) @ np.diag(gains) @ BRADFORD @ unadapted


def from_srgb_curve(value: Array) -> Array:
    """sRGB's curve, stored in [0, 1] -> linear."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def to_srgb_curve(value: Array) -> Array:
    value = value.clip(0, 1)
    return np.where(value <= 0.0031308, value * 12.92, 1.055 * value ** (1 / 2.4) - 0.055)


def as_srgb(xyz: Array) -> Array:
    """XYZ under D50 (..., 3) to sRGB in 0 to 255, colours outside clipped per channel."""
    linear = xyz @ np.linalg.inv(matrix(SRGB)).T
    return 255 * to_srgb_curve(linear)


def expected(stored: Array, primaries: Primaries, curve: Curve) -> Array:
    """What stored RGB (..., 3) of 0 to 255 is in sRGB of 0 to 255."""
    return as_srgb(curve(stored / 255) @ matrix(primaries).T)


def lab_as_srgb(lab: tuple[float, float, float]) -> Array:
    """CIE L*a*b* under D50 to sRGB in 0 to 255."""
    y = (lab[0] + 16) / 116
    parts = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    return as_srgb(np.where(parts > 6 / 29, parts**3, 3 * (6 / 29) ** 2 * (parts - 4 / 29)) * D50)


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _gamma(gamma: float | None) -> bytes:
    if gamma is None:  # sRGB's curve as a parametric curve of type 3
        return b"para\0\0\0\0\0\3\0\0" + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def _assemble(space: bytes, tags: dict[bytes, bytes], *, output: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    name = b"test\0"
    common = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + _fixed(*D50),
    }
    table, data, start = b"", b"", 132 + 12 * len(common | tags)
    for tag, content in (common | tags).items():
        table += tag + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    body = struct.pack(">I", len(common | tags)) + table + data
    head = struct.pack(">I4sI", 128 + len(body), b"test", 0x02400000) + kind + space + output
    return head + bytes(12) + b"acsp" + bytes(28) + _fixed(*D50) + bytes(48) + body


def rgb_profile(primaries: Primaries, gamma: float | None = None) -> bytes:
    """A profile of three primaries; `gamma` None: sRGB's curve."""
    columns = matrix(primaries).T
    colours = {
        tag: b"XYZ \0\0\0\0" + _fixed(*xyz) for tag, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    }
    return _assemble(b"RGB ", colours | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _gamma(gamma)))


def grey_profile(gamma: float | None) -> bytes:
    """A profile of grey; `gamma` None: sRGB's curve."""
    return _assemble(b"GRAY", {b"kTRC": _gamma(gamma)})


def cmyk_profile(lab: Callable[[int, int, int, int], tuple[float, float, float]]) -> bytes:
    """A profile of a press: `lab` gives CIE L*a*b* for each corner, 0 without ink or 1 with; it is linear between."""
    corners = [lab(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    grid = bytes(round(part) for corner in corners for part in (corner[0] * 2.55, corner[1] + 128, corner[2] + 128))
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + grid + ramp * 3
    return _assemble(b"CMYK", {b"A2B0": table, b"A2B1": table}, output=b"Lab ", kind=b"prtr")
