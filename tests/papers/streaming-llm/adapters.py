"""How published windows with sinks map to ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attlas.contract.cases import Case, Check, adapter
from attlas.parts.evict.streaming_llm import StreamingLLM
from reference.model import on_model
from reference.policies import press


def window(config: dict[str, Any]) -> StreamingLLM:
    return StreamingLLM(1.0 - config["compression_ratio"], sinks=config["n_sink"])


def rerotated(config: dict[str, Any]) -> StreamingLLM:
    return StreamingLLM(1.0 - config["compression_ratio"], sinks=config["n_sink"], rerotate=True)


def everything(config: dict[str, Any]) -> StreamingLLM:
    """A budget of the whole context changes nothing."""
    return StreamingLLM(1.0 - config["compression_ratio"])


@adapter("press-streaming", mechanism="streaming-llm")
def one_layer(case: Case) -> Iterator[Check]:
    return press(case, window(case.config))


@adapter("model-streaming-llm", mechanism="streaming-llm")
def whole_model(case: Case) -> Iterator[Check]:
    return on_model(case, window)


@adapter("model-streaming-llm-rerotated", mechanism="streaming-llm")
def rerotated_on_model(case: Case) -> Iterator[Check]:
    case.states(position_of_first_question_token="n_kept")
    return on_model(case, rerotated)


@adapter("model-full-cache", mechanism="streaming-llm")
def everything_on_model(case: Case) -> Iterator[Check]:
    return on_model(case, everything)
