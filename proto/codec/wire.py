"""The protobuf wire format, as far as the two large messages need it: large fields are never copied.

The generated classes copy every tensor two or three times on each side. Here a message is joined once when it is
written, and its tensors are views of the received bytes when it is read. Format: protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

VARINT = 0
FIXED64 = 1
BYTES = 2
FIXED32 = 5
REPEATED = -1
"""In a schema: numbers, packed into one field of bytes or not."""

Value: TypeAlias = int | memoryview
Schema: TypeAlias = Mapping[int, tuple[str, int]]
"""Field number -> name and wire type."""


class MalformedMessage(ValueError):
    """Bytes that do not follow the wire format."""


def varint(value: int) -> bytes:
    """Encode 0 <= value < 2**64."""
    if value < 0x80:
        return value.to_bytes()
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def tag(number: int, kind: int) -> bytes:
    """What precedes a field's number, its four bytes, or its length and content."""
    return varint(number << 3 | (BYTES if kind == REPEATED else kind))


def packed(values: Sequence[int]) -> bytes:
    """The content of a repeated numeric field."""
    return b"".join(map(varint, values))


def read_fields(message: memoryview, most: int) -> Iterator[tuple[int, int, Value]]:
    """Field number, wire type and value of at most `most` fields, in the order of the bytes.

    Raises `MalformedMessage`.
    """
    position, end = 0, len(message)
    fields = 0
    while position < end:
        fields += 1
        if fields > most:
            raise MalformedMessage(f"more than {most} fields")
        head = message[position]
        head, position = (head, position + 1) if head < 0x80 else _read_varint(message, position)
        number, kind = head >> 3, head & 7
        if not 0 < number < 1 << 29:
            raise MalformedMessage(f"field number {number} at byte {position}")
        if kind == VARINT:
            value, position = _read_varint(message, position)
            yield number, kind, value
            continue
        if kind == BYTES:
            length, position = _read_varint(message, position)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise MalformedMessage(f"wire type {kind} at byte {position}")
        if length > end - position:
            raise MalformedMessage(f"field {number} has {length} bytes; {end - position} are left")
        yield number, kind, message[position : position + length]
        position += length


def read_known(message: memoryview, schema: Schema, most: int) -> dict[str, Value | list[int]]:
    """The fields of `schema` by name: the last of each, or all of a repeated one. Others are passed over.

    Raises `MalformedMessage`, also for more than `most` fields, known or not.
    """
    values: dict[str, Value | list[int]] = {}
    repeated: dict[str, list[int]] = {}
    for number, kind, value in read_fields(message, most):
        name, wanted = schema.get(number, ("", None))
        if wanted == kind:
            values[name] = value
        elif wanted == REPEATED:
            numbers = [value] if isinstance(value, int) else _unpack(value) if kind == BYTES else []
            repeated.setdefault(name, []).extend(numbers)
    return values | repeated if repeated else values


def _unpack(content: memoryview) -> list[int]:
    if max(content, default=0) < 0x80:
        return list(content)
    numbers, position = [], 0
    while position < len(content):
        number, position = _read_varint(content, position)
        numbers.append(number)
    return numbers


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number at `position` and where it ends."""
    if position < len(message) and (byte := message[position]) < 0x80:
        return byte, position + 1
    value = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                raise MalformedMessage("a number exceeds 64 bits")
            return value, position
        shift += 7
    raise MalformedMessage("a number is cut off or takes more than 10 bytes")
