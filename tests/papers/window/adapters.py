"""How published windows with sinks map to ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attlas.contract.cases import Case, Check, adapter
from attlas.parts.evict.window import SinksWindow
from reference.model import on_model
from reference.policies import press


def window(config: dict[str, Any]) -> SinksWindow:
    return SinksWindow(1.0 - config["compression_ratio"], sinks=config["n_sink"])


def rerotated(config: dict[str, Any]) -> SinksWindow:
    return SinksWindow(1.0 - config["compression_ratio"], sinks=config["n_sink"], rerotate=True)


def everything(config: dict[str, Any]) -> SinksWindow:
    """A budget of the whole context changes nothing."""
    return SinksWindow(1.0 - config["compression_ratio"])


@adapter("press-streaming", mechanism="window")
def one_layer(case: Case) -> Iterator[Check]:
    return press(case, window(case.config))


@adapter("model-streaming-llm", mechanism="window")
def whole_model(case: Case) -> Iterator[Check]:
    return on_model(case, window)


@adapter("model-streaming-llm-rerotated", mechanism="window")
def rerotated_on_model(case: Case) -> Iterator[Check]:
    return on_model(case, rerotated)


@adapter("model-full-cache", mechanism="window")
def everything_on_model(case: Case) -> Iterator[Check]:
    return on_model(case, everything)
