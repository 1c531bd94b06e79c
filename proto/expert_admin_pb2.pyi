from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UpdateWeightsRequest(_message.Message):
    __slots__ = ("placement_epoch", "folder", "model_fingerprint")
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    placement_epoch: int
    folder: str
    model_fingerprint: str
    def __init__(self, placement_epoch: _Optional[int] = ..., folder: _Optional[str] = ..., model_fingerprint: _Optional[str] = ...) -> None: ...

class ShareCallsRequest(_message.Message):
    __slots__ = ("placement_epoch", "model_fingerprint", "share")
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    placement_epoch: int
    model_fingerprint: str
    share: float
    def __init__(self, placement_epoch: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class ReleaseWeightsRequest(_message.Message):
    __slots__ = ("placement_epoch", "model_fingerprint")
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    placement_epoch: int
    model_fingerprint: str
    def __init__(self, placement_epoch: _Optional[int] = ..., model_fingerprint: _Optional[str] = ...) -> None: ...

class UpdateShardRequest(_message.Message):
    __slots__ = ("placement_epoch", "layers")
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    placement_epoch: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    def __init__(self, placement_epoch: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ...) -> None: ...

class LayerExperts(_message.Message):
    __slots__ = ("layer", "experts", "devices")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    devices: _containers.RepeatedCompositeFieldContainer[DeviceExperts]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., devices: _Optional[_Iterable[_Union[DeviceExperts, _Mapping]]] = ...) -> None: ...

class DeviceExperts(_message.Message):
    __slots__ = ("number", "experts")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    number: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, number: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class UpdateShardResponse(_message.Message):
    __slots__ = ("read_bytes", "total_bytes", "ready_layers", "total_layers", "done")
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    read_bytes: int
    total_bytes: int
    ready_layers: int
    total_layers: int
    done: Done
    def __init__(self, read_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., ready_layers: _Optional[int] = ..., total_layers: _Optional[int] = ..., done: _Optional[_Union[Done, _Mapping]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("placement_epoch", "overlap_ns", "next_model_fingerprint")
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_NS_FIELD_NUMBER: _ClassVar[int]
    NEXT_MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    placement_epoch: int
    overlap_ns: int
    next_model_fingerprint: str
    def __init__(self, placement_epoch: _Optional[int] = ..., overlap_ns: _Optional[int] = ..., next_model_fingerprint: _Optional[str] = ...) -> None: ...
