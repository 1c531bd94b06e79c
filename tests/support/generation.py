"""Running transformers' models with their experts here or on servers, for comparisons."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expertd.client.call.pending import PendingCall
from expertd.client.sync import SyncCoordinator
from tests.support.families import layers_of

NEW_TOKENS = 64
# transformers annotates these too loosely to be checked.
Model = Any
AutoModel: Any = AutoModelForCausalLM


def load(folder: Path, experts: str, **options: Any) -> Model:  # noqa: ANN401
    return AutoModel.from_pretrained(folder, experts_implementation=experts, **options).eval()


def prompts(count: int = 3, length: int = 9, seed: int = 6) -> Tensor:
    return torch.randint(0, 1024, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def generate(model: Model, ids: Tensor, count: int = NEW_TOKENS) -> Tensor:
    tokens: Tensor = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    return tokens


@torch.inference_mode()
def logits(model: Model, ids: Tensor) -> Tensor:
    result: Tensor = model(ids).logits
    return result


async def in_thread(call: Callable[[], None]) -> None:
    """Run beside the servers, whose event loop is this thread's."""
    await asyncio.to_thread(call)


@contextlib.contextmanager
def no_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What runs in the block makes neither transformers, whose logger keeps to itself, nor expertd warn."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    before = len(caplog.records)
    yield
    logger.removeHandler(caplog.handler)
    # Not asyncio's, which tells of gRPC's tasks that other tests left behind, nor of servers that a busy machine slows.
    told = [record for record in caplog.records[before:] if record.levelno >= logging.WARNING]
    told = [record for record in told if record.name.startswith(("expertd", "transformers"))]
    assert not [record for record in told if not record.name.startswith("expertd.client.fleet")]


def experts_of(model: Model) -> list[torch.nn.Module]:
    """The experts of each layer that has any."""
    return [layer.mlp.experts for layer in layers_of(model) if hasattr(layer.mlp, "experts")]


def round_inputs(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    """Let the local experts of `model` see hidden states as they are sent, in BF16: all else stays FP32.

    Without it a token whose router is nearly undecided may choose another expert in the next layer.
    """

    def rounded(self: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # noqa: ANN401
        output: Tensor = type(self).forward.__wrapped__(self, hidden.bfloat16().float(), ids, weights)
        return output

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "rounded", rounded)
    model.set_experts_implementation("rounded")


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """One token a word, into `folder`; the last of `words` stands for all others."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, unk_token=words[-1]).save_pretrained(folder)


@contextlib.contextmanager
def one_after_the_other(model: Model) -> Iterator[None]:
    """Shared experts of `model` do not run while the servers compute."""
    with pytest.MonkeyPatch.context() as patch:
        for block in {type(layer.mlp) for layer in layers_of(model)}:
            if hasattr(block.forward, "__wrapped__"):
                patch.setattr(block, "forward", block.forward.__wrapped__)
        yield


def watch_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls that are begun and collected from now on, in order."""
    seen: list[str] = []
    submit, result = SyncCoordinator.submit, PendingCall.result

    def seen_submit(moe: SyncCoordinator, *arguments: Any, **named: Any) -> PendingCall:  # noqa: ANN401
        pending = submit(moe, *arguments, **named)
        seen.append("submitted")
        return pending

    def seen_result(pending: PendingCall) -> Any:  # noqa: ANN401
        seen.append("collected")
        return result(pending)

    monkeypatch.setattr(SyncCoordinator, "submit", seen_submit)
    monkeypatch.setattr(PendingCall, "result", seen_result)
    return seen
