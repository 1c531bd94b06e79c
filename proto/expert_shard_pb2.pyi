from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT8_E4M3FN: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT4_E2M1FN_X2: _ClassVar[DType]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT8_E4M3FN: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT4_E2M1FN_X2: DType

class GetShardRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetShardResponse(_message.Message):
    __slots__ = ("model_fingerprint", "placement_epoch", "config", "layers", "experts", "weight_dtype", "hidden_dtypes", "reply_dtypes", "limits", "backend", "device", "backend_reason", "version", "locality", "expert_digests", "has_manifest", "instruction_set", "checkpoint_weight_dtypes", "metrics_address", "layer_experts", "admin_address", "next_generation", "update", "devices")
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_DTYPES_FIELD_NUMBER: _ClassVar[int]
    REPLY_DTYPES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_REASON_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LOCALITY_FIELD_NUMBER: _ClassVar[int]
    EXPERT_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    HAS_MANIFEST_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_SET_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_WEIGHT_DTYPES_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LAYER_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ADMIN_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NEXT_GENERATION_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    model_fingerprint: str
    placement_epoch: int
    config: ModelConfig
    layers: _containers.RepeatedScalarFieldContainer[int]
    experts: _containers.RepeatedScalarFieldContainer[int]
    weight_dtype: DType
    hidden_dtypes: _containers.RepeatedScalarFieldContainer[DType]
    reply_dtypes: _containers.RepeatedScalarFieldContainer[DType]
    limits: Limits
    backend: str
    device: str
    backend_reason: str
    version: str
    locality: str
    expert_digests: bytes
    has_manifest: bool
    instruction_set: str
    checkpoint_weight_dtypes: _containers.RepeatedScalarFieldContainer[DType]
    metrics_address: str
    layer_experts: _containers.RepeatedCompositeFieldContainer[ExpertList]
    admin_address: str
    next_generation: Generation
    update: UpdateProgress
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    def __init__(self, model_fingerprint: _Optional[str] = ..., placement_epoch: _Optional[int] = ..., config: _Optional[_Union[ModelConfig, _Mapping]] = ..., layers: _Optional[_Iterable[int]] = ..., experts: _Optional[_Iterable[int]] = ..., weight_dtype: _Optional[_Union[DType, str]] = ..., hidden_dtypes: _Optional[_Iterable[_Union[DType, str]]] = ..., reply_dtypes: _Optional[_Iterable[_Union[DType, str]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., backend: _Optional[str] = ..., device: _Optional[str] = ..., backend_reason: _Optional[str] = ..., version: _Optional[str] = ..., locality: _Optional[str] = ..., expert_digests: _Optional[bytes] = ..., has_manifest: _Optional[bool] = ..., instruction_set: _Optional[str] = ..., checkpoint_weight_dtypes: _Optional[_Iterable[_Union[DType, str]]] = ..., metrics_address: _Optional[str] = ..., layer_experts: _Optional[_Iterable[_Union[ExpertList, _Mapping]]] = ..., admin_address: _Optional[str] = ..., next_generation: _Optional[_Union[Generation, _Mapping]] = ..., update: _Optional[_Union[UpdateProgress, _Mapping]] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("number", "name", "lost", "room", "layer_experts")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    ROOM_FIELD_NUMBER: _ClassVar[int]
    LAYER_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    number: int
    name: str
    lost: bool
    room: int
    layer_experts: _containers.RepeatedCompositeFieldContainer[ExpertList]
    def __init__(self, number: _Optional[int] = ..., name: _Optional[str] = ..., lost: _Optional[bool] = ..., room: _Optional[int] = ..., layer_experts: _Optional[_Iterable[_Union[ExpertList, _Mapping]]] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("model_fingerprint", "expert_digests", "has_manifest", "checkpoint_weight_dtypes", "share")
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EXPERT_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    HAS_MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_WEIGHT_DTYPES_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    model_fingerprint: str
    expert_digests: bytes
    has_manifest: bool
    checkpoint_weight_dtypes: _containers.RepeatedScalarFieldContainer[DType]
    share: float
    def __init__(self, model_fingerprint: _Optional[str] = ..., expert_digests: _Optional[bytes] = ..., has_manifest: _Optional[bool] = ..., checkpoint_weight_dtypes: _Optional[_Iterable[_Union[DType, str]]] = ..., share: _Optional[float] = ...) -> None: ...

class UpdateProgress(_message.Message):
    __slots__ = ("read_bytes", "total_bytes", "ready_layers", "total_layers")
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_LAYERS_FIELD_NUMBER: _ClassVar[int]
    read_bytes: int
    total_bytes: int
    ready_layers: int
    total_layers: int
    def __init__(self, read_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., ready_layers: _Optional[int] = ..., total_layers: _Optional[int] = ...) -> None: ...

class ExpertList(_message.Message):
    __slots__ = ("experts",)
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, experts: _Optional[_Iterable[int]] = ...) -> None: ...

class ModelConfig(_message.Message):
    __slots__ = ("model_type", "hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "num_hidden_layers", "first_k_dense_replace", "moe_layer_freq", "dense_layers")
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MOE_INTERMEDIATE_SIZE_FIELD_NUMBER: _ClassVar[int]
    N_ROUTED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_PER_TOK_FIELD_NUMBER: _ClassVar[int]
    N_GROUP_FIELD_NUMBER: _ClassVar[int]
    TOPK_GROUP_FIELD_NUMBER: _ClassVar[int]
    ROUTED_SCALING_FACTOR_FIELD_NUMBER: _ClassVar[int]
    NORM_TOPK_PROB_FIELD_NUMBER: _ClassVar[int]
    NUM_HIDDEN_LAYERS_FIELD_NUMBER: _ClassVar[int]
    FIRST_K_DENSE_REPLACE_FIELD_NUMBER: _ClassVar[int]
    MOE_LAYER_FREQ_FIELD_NUMBER: _ClassVar[int]
    DENSE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    model_type: str
    hidden_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    num_hidden_layers: int
    first_k_dense_replace: int
    moe_layer_freq: int
    dense_layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model_type: _Optional[str] = ..., hidden_size: _Optional[int] = ..., moe_intermediate_size: _Optional[int] = ..., n_routed_experts: _Optional[int] = ..., num_experts_per_tok: _Optional[int] = ..., n_group: _Optional[int] = ..., topk_group: _Optional[int] = ..., routed_scaling_factor: _Optional[float] = ..., norm_topk_prob: _Optional[bool] = ..., num_hidden_layers: _Optional[int] = ..., first_k_dense_replace: _Optional[int] = ..., moe_layer_freq: _Optional[int] = ..., dense_layers: _Optional[_Iterable[int]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_tokens_per_request", "max_message_bytes", "max_queued_tokens", "max_queued_bytes")
    MAX_TOKENS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_tokens_per_request: int
    max_message_bytes: int
    max_queued_tokens: int
    max_queued_bytes: int
    def __init__(self, max_tokens_per_request: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_queued_tokens: _Optional[int] = ..., max_queued_bytes: _Optional[int] = ...) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("request_id", "model_fingerprint", "placement_epoch", "layer", "num_tokens", "top_k", "hidden_dtype", "reply_dtype", "hidden", "hidden_scales", "expert_ids", "weights", "timeout_us", "segment_offset", "traceparent", "cancels", "gpu_offset", "fields_checksum", "tensors_checksum", "sums_offset")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_DTYPE_FIELD_NUMBER: _ClassVar[int]
    REPLY_DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SCALES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_US_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    GPU_OFFSET_FIELD_NUMBER: _ClassVar[int]
    FIELDS_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    TENSORS_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    SUMS_OFFSET_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    model_fingerprint: str
    placement_epoch: int
    layer: int
    num_tokens: int
    top_k: int
    hidden_dtype: DType
    reply_dtype: DType
    hidden: bytes
    hidden_scales: bytes
    expert_ids: bytes
    weights: bytes
    timeout_us: int
    segment_offset: int
    traceparent: str
    cancels: int
    gpu_offset: int
    fields_checksum: int
    tensors_checksum: int
    sums_offset: int
    def __init__(self, request_id: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., placement_epoch: _Optional[int] = ..., layer: _Optional[int] = ..., num_tokens: _Optional[int] = ..., top_k: _Optional[int] = ..., hidden_dtype: _Optional[_Union[DType, str]] = ..., reply_dtype: _Optional[_Union[DType, str]] = ..., hidden: _Optional[bytes] = ..., hidden_scales: _Optional[bytes] = ..., expert_ids: _Optional[bytes] = ..., weights: _Optional[bytes] = ..., timeout_us: _Optional[int] = ..., segment_offset: _Optional[int] = ..., traceparent: _Optional[str] = ..., cancels: _Optional[int] = ..., gpu_offset: _Optional[int] = ..., fields_checksum: _Optional[int] = ..., tensors_checksum: _Optional[int] = ..., sums_offset: _Optional[int] = ...) -> None: ...

class ExecuteResponse(_message.Message):
    __slots__ = ("request_id", "error", "partials_dtype", "partials", "receipt_experts", "receipt_pairs", "timings", "checksum")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PARTIALS_DTYPE_FIELD_NUMBER: _ClassVar[int]
    PARTIALS_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_PAIRS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    error: Error
    partials_dtype: DType
    partials: bytes
    receipt_experts: _containers.RepeatedScalarFieldContainer[int]
    receipt_pairs: _containers.RepeatedScalarFieldContainer[int]
    timings: Timings
    checksum: int
    def __init__(self, request_id: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., partials_dtype: _Optional[_Union[DType, str]] = ..., partials: _Optional[bytes] = ..., receipt_experts: _Optional[_Iterable[int]] = ..., receipt_pairs: _Optional[_Iterable[int]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class RegisterSharedMemoryRequest(_message.Message):
    __slots__ = ("gpu",)
    GPU_FIELD_NUMBER: _ClassVar[int]
    gpu: str
    def __init__(self, gpu: _Optional[str] = ...) -> None: ...

class RegisterSharedMemoryResponse(_message.Message):
    __slots__ = ("socket", "ticket", "ticket_seconds", "gpu", "lane_version")
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TICKET_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    LANE_VERSION_FIELD_NUMBER: _ClassVar[int]
    socket: str
    ticket: bytes
    ticket_seconds: int
    gpu: str
    lane_version: int
    def __init__(self, socket: _Optional[str] = ..., ticket: _Optional[bytes] = ..., ticket_seconds: _Optional[int] = ..., gpu: _Optional[str] = ..., lane_version: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("decode_ns", "queue_ns", "copy_in_ns", "compute_ns", "copy_out_ns")
    DECODE_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    COPY_IN_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    COPY_OUT_NS_FIELD_NUMBER: _ClassVar[int]
    decode_ns: int
    queue_ns: int
    copy_in_ns: int
    compute_ns: int
    copy_out_ns: int
    def __init__(self, decode_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., copy_in_ns: _Optional[int] = ..., compute_ns: _Optional[int] = ..., copy_out_ns: _Optional[int] = ...) -> None: ...

class VerifyShardRequest(_message.Message):
    __slots__ = ("layers", "experts", "seed", "model_fingerprint")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    experts: _containers.RepeatedScalarFieldContainer[int]
    seed: int
    model_fingerprint: str
    def __init__(self, layers: _Optional[_Iterable[int]] = ..., experts: _Optional[_Iterable[int]] = ..., seed: _Optional[int] = ..., model_fingerprint: _Optional[str] = ...) -> None: ...

class VerifyShardResponse(_message.Message):
    __slots__ = ("layer", "expert", "tokens", "relative_error", "cosine", "gain", "block_gain", "block")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    GAIN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_GAIN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    tokens: int
    relative_error: float
    cosine: float
    gain: float
    block_gain: float
    block: str
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., tokens: _Optional[int] = ..., relative_error: _Optional[float] = ..., cosine: _Optional[float] = ..., gain: _Optional[float] = ..., block_gain: _Optional[float] = ..., block: _Optional[str] = ...) -> None: ...
