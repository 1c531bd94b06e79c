"""Tensors to messages and back: the only room that knows how expertd's types look on the wire."""

from expertd.proto.codec.raw import (
    CANCELLATION_ID,
    EMPTY,
    RawRequest,
    RawResponse,
    check_is_request,
    encode_cancellation,
    encode_request,
    parse_request,
    parse_response,
)
from expertd.proto.codec.request import ExecuteCall, decode_call, encode_call
from expertd.proto.codec.response import (
    PUSHBACK,
    ExecuteResult,
    StageTimings,
    add_partials,
    decode_result,
    encode_error,
    encode_result,
    read_error,
    whole_milliseconds,
)
from expertd.proto.codec.segment import segment_layout
from expertd.proto.codec.shard import (
    DIGEST_BYTES,
    ENVELOPE_BYTES,
    SERVICE,
    Registration,
    RegistrationRequest,
    ShardInfo,
    ShardRequest,
    ShardResponse,
    VerifyRequest,
    VerifyResponse,
    check_shard_request,
    decode_report,
    decode_shard,
    encode_shard,
    message_bytes,
)
from expertd.proto.codec.tensors import HIDDEN_DTYPES, REPLY_DTYPES, flat_bytes
