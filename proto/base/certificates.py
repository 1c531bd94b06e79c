"""When certificates end, as PEM files tell it: no library that clients would need for nothing else."""

from __future__ import annotations

import contextlib
import datetime
import re
import ssl
from collections.abc import Mapping
from pathlib import Path

BLOCK = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
VERSION = 0xA0
FORMATS = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}
"""Of UTCTime and GeneralizedTime, by their tags in DER (RFC 5280, 4.1.2.5)."""


def ends_of(files: Mapping[str, Path | None]) -> dict[str, float]:
    """Name -> `first_end` of its file as it is now; without what cannot be read: who uses it tells of that."""
    ends = {}
    for name, path in files.items():
        if path is not None:
            with contextlib.suppress(OSError, ValueError):
                ends[name] = first_end(path.read_bytes())
    return ends


def first_end(pem: bytes) -> float:
    """The Unix time from which on one of the certificates in `pem` is not valid. Raises `ValueError` for none."""
    return min(_end(ssl.PEM_cert_to_DER_cert(block)) for block in BLOCK.findall(pem.decode(errors="replace")))


def _end(der: bytes) -> float:
    """`notAfter` of a certificate."""
    try:
        ((_, certificate),) = _items(der)
        fields = _items(_items(certificate)[0][1])
        # Before validity: serial number, algorithm, issuer.
        tag, text = _items(fields[3 + (fields[0][0] == VERSION)][1])[1]
        return datetime.datetime.strptime(text.decode(), FORMATS[tag]).replace(tzinfo=datetime.UTC).timestamp()
    except (IndexError, KeyError) as error:
        raise ValueError(f"no certificate as RFC 5280 has it: {error!r}") from None


def _items(der: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of each element, one after another."""
    items, at = [], 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length & 0x80:
            size = length & 0x7F
            length, at = int.from_bytes(der[at : at + size]), at + size
        items.append((tag, der[at : at + length]))
        at += length
    return items
