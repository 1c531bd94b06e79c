"""A call that failed fails the requests of its batch, and nothing else: vLLM would end with its engine.

The worker fills all rows with NaN once a call has failed, which spreads through the rest of the batch's pass, over
tensor and pipeline parallel ranks, to the logits, where vLLM counts NaN by request. Its scheduler, wrapped here, ends
those requests with an error, and forgets the blocks of its prefix cache that were written meanwhile.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from vllm import envs
from vllm.exceptions import RetryableRequestError
from vllm.forward_context import ForwardContext
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from expertd.client.integrations.vllm.methods import wrap
from expertd.client.integrations.vllm.settings import read

log = logging.getLogger("vllm.expertd")
FIELD = "expertd_error"
"""Of a forward context, and of a worker's output: why calls of the batch failed."""
COUNTS_NANS = "VLLM_COMPUTE_NANS_IN_LOGITS"
COUNTS = "compute_nans"
"""The same, in the sampler of the second model runner."""
RUNNERS = {"vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"}
"""Of which a worker has loaded the one that it uses."""
OTHERWISE = "logits are NaN; the workers' logs say whether a call to expertd servers failed"
TOLD_SECONDS = 5.0
"""For as long an engine's reason explains the errors of its API server."""

_latest: list[str] = []
"""Of the worker's batch that is being computed."""
_told: tuple[float, str] = (float("-inf"), "")


def fail(context: ForwardContext, error: Exception) -> None:
    """From now on calls of this pass are not made, and all its rows are NaN."""
    if not failed(context):
        context.additional_kwargs[FIELD] = str(error)
        _latest.append(f"{type(error).__name__}: {error}")
        log.error("the requests of a batch fail: %s", _latest[-1])


def failed(context: ForwardContext) -> bool:
    return FIELD in context.additional_kwargs


def count_nans() -> None:
    """In a worker, before it computes: have NaN counted, and the reason sent along."""
    os.environ[COUNTS_NANS] = "1"
    if not envs.VLLM_COMPUTE_NANS_IN_LOGITS:
        raise ValueError(f"{COUNTS_NANS} is 0 and read already; start vLLM with {COUNTS_NANS}=1")
    for name in RUNNERS & sys.modules.keys():
        wrap(sys.modules[name].GPUModelRunner, "sample_tokens", _with_reason)


def install() -> None:
    """In all processes: what of it is not used there costs nothing."""
    wrap(Scheduler, "update_from_output", _without_failed)
    wrap(OutputProcessor, "process_outputs", _noting_reasons)
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    wrap(GenerateBaseServing, "_raise_if_error", _with_told_reason)


def _with_reason(original: Callable[..., Any], runner: Any, *given: Any, **named: Any) -> Any:  # noqa: ANN401
    if hasattr(runner.sampler, COUNTS):
        # The second runner's was made before any layer could ask for it.
        setattr(runner.sampler, COUNTS, True)
    output = original(runner, *given, **named)
    if _latest:
        copied = getattr(output, "_model_runner_output", None) or getattr(output, "model_runner_output", None)
        setattr(copied or output, FIELD, _latest[0])
        _latest.clear()
    return output


def _without_failed(
    original: Callable[..., dict[int, EngineCoreOutputs]],
    scheduler: Scheduler,
    scheduled: SchedulerOutput,
    output: ModelRunnerOutput,
) -> dict[int, EngineCoreOutputs]:
    requests = [request for request, nans in (output.num_nans_in_logits or {}).items() if nans]
    if not requests or read(scheduler.vllm_config.additional_config) is None:
        return original(scheduler, scheduled, output)
    for request in requests:
        _forget(scheduler, output, request)
    outputs = original(scheduler, scheduled, output)
    reason = getattr(output, FIELD, OTHERWISE)
    for ended in scheduler.finish_requests(requests, RequestStatus.FINISHED_ERROR):
        of_client = outputs.setdefault(ended.client_index, EngineCoreOutputs(outputs=[]))
        of_client.outputs = [*of_client.outputs, _ended(ended, reason)]
    return outputs


def _forget(scheduler: Scheduler, output: ModelRunnerOutput, request: str) -> None:
    """What it sampled, and what it left in the prefix cache, is not used by anyone."""
    if output.sampled_token_ids:
        output.sampled_token_ids[output.req_id_to_index[request]] = []
    if request in scheduler.requests:
        blocks = scheduler.kv_cache_manager.get_block_ids(request)
        scheduler.kv_cache_manager.evict_blocks({block for group in blocks for block in group})


def _ended(request: Request, reason: str) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        stop_reason=reason,
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )


def _noting_reasons(
    original: Callable[..., Any],
    processor: OutputProcessor,
    outputs: Iterable[EngineCoreOutput],
    *given: Any,  # noqa: ANN401
    **named: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    global _told
    for output in outputs:
        if isinstance(output.stop_reason, str) and str(output.finish_reason) == "error":
            _told = (time.monotonic(), output.stop_reason)
    return original(processor, outputs, *given, **named)


def _with_told_reason(original: Callable[..., None], serving: Any, finish_reason: str | None, request: str) -> None:  # noqa: ANN401
    """HTTP 503 with the reason, rather than vLLM's 500 without any."""
    when, reason = _told
    if finish_reason == "error" and time.monotonic() - when < TOLD_SECONDS:
        raise RetryableRequestError(f"experts could not be computed: {reason}")
    original(serving, finish_reason, request)
