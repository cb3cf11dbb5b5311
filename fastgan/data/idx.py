"""Reading and writing IDX files, the format of MNIST (http://yann.lecun.com/exdb/mnist, "file formats").

An IDX file is a magic number (two zero bytes, the element type, the number of dimensions), the
sizes as big-endian 32-bit integers, and the elements. Images have three dimensions, labels one.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch

_UNSIGNED_BYTE = 0x08
_KINDS = {1: "labels", 3: "images"}


class DataError(ValueError):
    """Training data that is missing, damaged or unfit; the message names the file and the remedy."""


def read_idx(path: Path, kind: str) -> torch.Tensor:
    """Read a raw or gzipped IDX file of unsigned bytes.

    Args:
        path: the file; gzip is recognised by its content.
        kind: ``"images"`` (three dimensions) or ``"labels"`` (one).

    Returns:
        uint8 tensor [N, height, width] or [N].

    Raises:
        DataError: the file is unreadable, truncated, damaged, no IDX file, or of the other kind.
    """
    content = read_bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(f"{path}: not an IDX file (first bytes {content[:4].hex(' ') or 'missing'})")
    element_type, dimensions = content[2], content[3]
    if element_type != _UNSIGNED_BYTE:
        raise DataError(f"{path}: IDX element type must be 0x08 (unsigned byte), got {element_type:#04x}")
    if _KINDS.get(dimensions) != kind:
        found = _KINDS.get(dimensions, f"{dimensions}-dimensional data")
        raise DataError(f"{path}: expected IDX {kind}, got {found}")
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"{path}: truncated within the header ({len(content)} of {header} bytes)")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    size = math.prod(shape)
    if len(content) - header != size:
        state = "truncated" if len(content) - header < size else "too long"
        raise DataError(f"{path}: {state}: the header promises {size} bytes of data, got {len(content) - header}")
    if size == 0:
        raise DataError(f"{path}: holds no {kind}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def write_idx(path: Path, array: torch.Tensor) -> None:
    """Write a uint8 tensor [N, height, width] or [N] as a gzipped IDX file (same bytes on every run)."""
    header = struct.pack(f">BBBB{array.dim()}I", 0, 0, _UNSIGNED_BYTE, array.dim(), *array.shape)
    path.write_bytes(gzip.compress(header + array.contiguous().numpy().tobytes(), 9, mtime=0))


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed where it is gzipped. Raises DataError."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
