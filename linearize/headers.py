"""Headers of weight files, walked before any library reads them: no number in one is believed.

A forged count would let a reader loop or allocate without end, so every count is held against the bytes that are left.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

SAFETENSORS_HEADER = 100_000_000  # bytes, the format's own limit
GGUF_ITEMS = 2**22  # of an array; the largest vocabularies have a quarter of a million
GGUF_DIMS = 4
GGUF_UINT32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY = 4, 7, 8, 9
GGUF_TEXT = 65_535  # bytes of a name, by the format, and of a text that is read
GGUF_ALIGNMENT = 32  # of tensors, where the file does not say another
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each scalar type


def safetensors_elements(path: Path) -> int:
    """Return how many elements the tensors of a safetensors file have.

    Raises:
        ValueError: the header is no safetensors header, or promises another number of bytes than there are.
    """
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it is shorter than a header")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, SAFETENSORS_HEADER):
            raise ValueError("the header reaches past the end of the file")
        try:
            header = json.loads(file.read(length))
            shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name in shapes]
            expected = 8 + length + max(ends, default=0)
            if size != expected:
                raise ValueError(f"its header promises {expected:,} bytes, the file has {size:,}")
            with safe_open(path, "pt"):  # checks dtypes, and that shapes and offsets agree
                return sum(math.prod(shape) for shape in shapes.values())
        except (KeyError, TypeError, AttributeError, IndexError, RecursionError, SafetensorError) as error:
            raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


@dataclass
class GgufHeader:
    """What is said of a GGUF file's tensors, and the texts and truth values among its entries.

    Attributes:
        tensors: how many there are.
        elements: of all of them.
        texts: entries that are texts, by their names.
        flags: entries that are true or false.
    """

    tensors: int = 0
    elements: int = 0
    texts: dict[str, str] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)


def gguf_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file, all of whose tensors lie within the file.

    Raises:
        ValueError: a count, a type or an offset of the header does not fit the file.
    """
    with path.open("rb") as file:
        return _Gguf(file, path.stat().st_size).header()


class _Gguf:
    """A walk through a GGUF header (ggml's docs/gguf.md, versions 2 and 3, little-endian)."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size

    def header(self) -> GgufHeader:
        """Walk to the end of the header."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if self._take(4) != b"GGUF":
            raise ValueError("it does not start with the letters GGUF")
        self._take(4)  # the version
        tensors, entries = self._number("Q"), self._number("Q")
        self._fits(tensors, 24, "tensors")
        self._fits(entries, 13, "entries")
        found, alignment = GgufHeader(tensors), GGUF_ALIGNMENT
        for _ in range(entries):
            name, kind = self._text(), self._number("I")
            if name == "general.alignment" and kind == GGUF_UINT32:
                alignment = self._number("I")
            elif kind == GGUF_BOOL:
                found.flags[name] = bool(self._number("B"))
            elif kind == GGUF_STRING:
                found.texts[name] = self._text()
            else:
                self._skip_value(kind)
        end = total = 0
        for _ in range(tensors):
            self._skip_string()
            dims = self._number("I")
            if dims > GGUF_DIMS:
                raise ValueError(f"a tensor has {dims} dimensions")
            count = math.prod(self._number("Q") for _ in range(dims))
            kind = self._number("I")
            if kind not in set(GGMLQuantizationType):
                raise ValueError(f"a tensor has the unknown type {kind}")
            block, length = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            held = count // block * length
            end, total = max(end, self._number("Q") + held), total + held
            found.elements += count
        start = self.file.tell() + -self.file.tell() % max(1, alignment)
        needed = start + max(end, total)  # tensors that lie on each other would promise what is not there
        if needed > self.size:
            raise ValueError(f"its tensors take {needed:,} bytes, the file has {self.size:,}")
        return found

    def _take(self, count: int) -> bytes:
        self._fits(count, 1, "bytes")
        return self.file.read(count)

    def _fits(self, count: int, each: int, what: str) -> None:
        left = self.size - self.file.tell()
        if count * each > left:
            raise ValueError(f"it promises {count:,} {what} where {left:,} bytes are left")

    def _number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}")))[0])

    def _skip(self, count: int) -> None:
        self._fits(count, 1, "bytes")
        self.file.seek(count, 1)

    def _text(self) -> str:
        """Read a string, of a long one its beginning."""
        length = self._number("Q")
        text = self._take(min(length, GGUF_TEXT)).decode("utf-8", "replace")
        self._skip(max(0, length - GGUF_TEXT))
        return text

    def _skip_string(self) -> None:
        self._skip(self._number("Q"))

    def _skip_value(self, kind: int, inner: bool = False) -> None:
        if kind in GGUF_SIZES:
            self._skip(GGUF_SIZES[kind])
        elif kind == GGUF_STRING:
            self._skip_string()
        elif kind == GGUF_ARRAY and not inner:
            item, count = self._number("I"), self._number("Q")
            if count > GGUF_ITEMS:
                raise ValueError(f"an array has {count:,} items")
            if item in GGUF_SIZES:
                self._skip(count * GGUF_SIZES[item])
                return
            for _ in range(count):
                self._skip_value(item, inner=True)
        else:
            raise ValueError(f"a value has the unknown type {kind}")
