"""Tensors to messages and back: the only room that knows how expertd's types look on the wire."""

from expertd.proto.codec.checksums import bytes_checksum
from expertd.proto.codec.raw import (
    CANCELLATION_ID,
    EMPTY,
    RawResponse,
    encode_cancellation,
    parse_response,
)
from expertd.proto.codec.request import ExecuteCall, encode_call
from expertd.proto.codec.response import (
    PUSHBACK,
    ExecuteResult,
    StageTimings,
    decode_result,
    encode_error,
    read_error,
    whole_milliseconds,
)
from expertd.proto.codec.shard import (
    DIGEST_BYTES,
    SERVICE,
    DeviceInfo,
    GenerationInfo,
    Registration,
    RegistrationRequest,
    ShardInfo,
    ShardRequest,
    ShardResponse,
    UpdateProgress,
    VerifyRequest,
    VerifyResponse,
    decode_report,
    decode_shard,
    encode_shard,
    message_bytes,
    tensor_bytes,
)
from expertd.proto.codec.tensors import DTYPE_CODES, DTYPES, HIDDEN_DTYPES, REPLY_DTYPES, flat_bytes
