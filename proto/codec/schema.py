"""The fields of a message as its descriptor has them: proto/expert_shard.proto is the one place that numbers them."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.codec import wire
from expertd.proto.codec.wire import FIXED32, VARINT, varint

_KINDS = {
    FieldDescriptor.TYPE_UINT32: wire.VARINT,
    FieldDescriptor.TYPE_UINT64: wire.VARINT,
    FieldDescriptor.TYPE_ENUM: wire.VARINT,
    FieldDescriptor.TYPE_FIXED32: wire.FIXED32,
    FieldDescriptor.TYPE_STRING: wire.BYTES,
    FieldDescriptor.TYPE_BYTES: wire.BYTES,
    FieldDescriptor.TYPE_MESSAGE: wire.BYTES,
}


class MessageSchema:
    """Reads and writes one kind of message by the names of its fields."""

    def __init__(self, message: type[Message], most_fields: int) -> None:
        """Messages of more fields, known or not, are malformed: what reading one costs is bounded before it is read."""
        self._most_fields = most_fields
        fields: list[Any] = sorted(message.DESCRIPTOR.fields, key=attrgetter("number"))
        self.names = tuple(field.name for field in fields)
        self.fields: wire.Schema = {
            field.number: (field.name, wire.REPEATED if field.is_repeated else _KINDS[field.type]) for field in fields
        }
        # What has presence is written even when it is zero or empty, which is not the same as absent.
        self._writing = {
            field.name: (wire.tag(field.number, kind), kind, field.has_presence)
            for field, (_, kind) in zip(fields, self.fields.values(), strict=True)
        }

    def read(self, data: bytes | bytearray) -> dict[str, wire.Value | list[int]]:
        """The fields that `data` has, bytes as views of it. Raises `wire.MalformedMessage`."""
        return wire.read_known(memoryview(data), self.fields, self._most_fields)

    def write(self, values: Mapping[str, Any], begin: bytes = b"") -> bytes:
        """A number, bytes or numbers for each field, in the order of `values`, after what `begin` has of the message.

        None stands for a field that is absent.
        """
        parts: list[bytes | memoryview] = [begin]
        for name, value in values.items():
            if value is None:
                continue
            tag, kind, explicit = self._writing[name]
            if value or explicit:
                parts.append(tag)
                if kind == VARINT:
                    parts.append(varint(value))
                elif kind == FIXED32:
                    parts.append(value)
                else:
                    content = wire.packed(value) if kind == wire.REPEATED else value
                    parts += (varint(len(content)), content)
        return b"".join(parts)


REQUEST = MessageSchema(pb.ExecuteRequest, 64)
# Receipts may come unpacked, a field for each number.
RESPONSE = MessageSchema(pb.ExecuteResponse, 1 << 16)
