"""The messages of a server's administration."""

from __future__ import annotations

from expertd.proto import expert_admin_pb2 as pb

ADMIN = pb.DESCRIPTOR.services_by_name["ExpertAdmin"].full_name
UpdateRequest = pb.UpdateShardRequest
UpdateResponse = pb.UpdateShardResponse
LayerExperts = pb.LayerExperts
DeviceExperts = pb.DeviceExperts
UpdateDone = pb.Done
WeightsRequest = pb.UpdateWeightsRequest
ShareRequest = pb.ShareCallsRequest
ReleaseRequest = pb.ReleaseWeightsRequest
