"""Transformers as the bytes of a skops file, which loads known types only."""

from __future__ import annotations

import struct
from io import BytesIO
from math import prod
from typing import IO, Any
from zipfile import ZIP_STORED, ZipFile

from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic

from portable_mlp.persistence.modelfile import check_json

_MOST_DIRECTORY = 2**20  # bytes; a transformer takes some 65 for each of its arrays
# A parameter of scikit-learn's encoders, and this library's own transformer
_TRUSTED = ["numpy.dtype", "portable_mlp.preprocessing.DateParts"]


def encode(transformer: Any) -> bytes:
    """Return a fitted transformer as bytes; raise a TypeError if these could not be loaded."""
    from skops.io import dumps, get_untrusted_types

    data: bytes = dumps(transformer)
    unknown = set(get_untrusted_types(data=data)) - set(_TRUSTED)
    if unknown:
        raise TypeError(f"preprocessing of {sorted(unknown)} cannot be saved: it is not loaded")
    _check_zip(BytesIO(data))
    return data


def decode(file: Any) -> Any:
    """Load the object of a skops file; raise a ValueError if the file is damaged."""
    from skops.io import load

    _check_zip(file)
    return load(file, trusted=_TRUSTED)


def _check_zip(file: Any) -> None:
    """Raise a ValueError if a zip archive is not as skops writes it, or expands when read."""
    # ZipFile reads the whole directory into memory.  The archive's last 22 bytes tell its length
    size = file.seek(0, 2)
    file.seek(max(0, size - 42))
    before, signature, *_, length, _, comment = struct.unpack("<20s4s4H2LH", file.read())
    long_form = before.startswith(b"PK\x06\x07")  # ZIP64 has a length of its own
    if signature != b"PK\x05\x06" or comment or long_form or length > _MOST_DIRECTORY:
        raise ValueError("its preprocessing is no zip archive, or has too many members")
    with ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > size:
            raise ValueError("its preprocessing is larger than what it is packed in")
        for member in members:
            if member.compress_type != ZIP_STORED:
                raise ValueError("its preprocessing is compressed")
            with archive.open(member) as content:
                if member.filename == "schema.json":
                    check_json(content.read())
                elif not member.filename.endswith(".npy"):
                    raise ValueError(f"its preprocessing has a {member.filename!r}")
                elif _npy_size(content) > member.file_size:
                    raise ValueError("its preprocessing has an array longer than its bytes")


def _npy_size(file: IO[bytes]) -> int:
    """Return the size in bytes of the array that the header of a ``.npy`` file describes."""
    readers = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}
    shape, _, dtype = readers[read_magic(file)](file)
    return prod(shape) * int(dtype.itemsize)
