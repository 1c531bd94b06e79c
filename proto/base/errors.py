"""What can go wrong with a request: one exception, one gRPC status, the same on both ends of the wire.

Those that Python has a kind of are of that kind, too: who calls through several libraries catches them by it.
"""

from __future__ import annotations

from typing import Self

import grpc


class ExpertdError(Exception):
    """Base of the errors that cross the wire; `code` is the gRPC status that carries it."""

    code = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        """`retry_after`: seconds after which the server that refused expects to accept, where it can tell."""
        super().__init__(message)
        self.retry_after = retry_after

    def again(self, prefix: str = "") -> Self:
        """A new exception that says the same: one that is raised in several places collects all their tracebacks."""
        return type(self)(f"{prefix}{self}", retry_after=self.retry_after)


class InvalidBatch(ExpertdError, ValueError):
    """The request is malformed; sending it again cannot help."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class UnknownExpert(ExpertdError):
    """A layer or expert that the server does not own."""

    code = grpc.StatusCode.NOT_FOUND


class ModelMismatch(ExpertdError):
    """The caller and the server hold different models."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class StalePlacement(ExpertdError):
    """The placement that the request was planned with is no longer in force."""

    code = grpc.StatusCode.ABORTED


class Overloaded(ExpertdError):
    """The server's queue is full, or the message exceeds its limit; nothing was computed."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(ExpertdError, ConnectionError):
    """The server is starting, draining or out of reach; another replica may answer."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(ExpertdError, TimeoutError):
    """No answer within the caller's time limit."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(ExpertdError):
    """The caller no longer wanted the answer."""

    code = grpc.StatusCode.CANCELLED


class Unauthenticated(ExpertdError):
    """The bearer token is missing or is none that the server accepts; nothing was read of the request."""

    code = grpc.StatusCode.UNAUTHENTICATED


class NotPermitted(ExpertdError):
    """The server shares no memory with this caller; calls go another way."""

    code = grpc.StatusCode.PERMISSION_DENIED


class ServerFault(ExpertdError):
    """The server, or its answer, is wrong; nothing of it was used."""

    code = grpc.StatusCode.INTERNAL


OUTCOMES: dict[str, int] = {"ok": 0} | {
    kind.code.name.lower(): kind.code.value[0] for kind in ExpertdError.__subclasses__()
}
"""What can become of a request, as metrics name it, and its gRPC status."""
_BY_CODE: dict[grpc.StatusCode, type[ExpertdError]] = {kind.code: kind for kind in ExpertdError.__subclasses__()}
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def error_from_status(code: grpc.StatusCode | int, message: str, retry_after: float | None = None) -> ExpertdError:
    """The exception that a gRPC status stands for; statuses outside the contract become `ServerFault`."""
    status = _CODES.get(code, grpc.StatusCode.UNKNOWN) if isinstance(code, int) else code
    kind = _BY_CODE.get(status)
    return kind(message, retry_after=retry_after) if kind else ServerFault(f"{status.name}: {message}")
