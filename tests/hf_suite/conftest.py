"""Makes Transformers' own tests importable as `tests`, and skips what the table in `skips` names."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from transformers.models.auto import modeling_auto

sys.path.insert(0, str(Path(__file__).parent))

import fetch
import skips

HERE = fetch.fetch()
sys.path.insert(0, str(HERE))


def stand_in(name: str, **classes: type) -> None:
    """A module in place of one that the source distribution leaves out."""
    module = types.ModuleType(name)
    for key, value in classes.items():
        setattr(module, key, value)
    sys.modules[name] = module


#: Exporters are tested by attlas itself; their mixins need packages of their own.
stand_in("tests.exporters", __path__=[])
stand_in(
    "tests.exporters.test_export",
    ExportTesterMixin=type("ExportTesterMixin", (), {}),
    ExportGenerateTesterMixin=type("ExportGenerateTesterMixin", (), {}),
)
HAS_GENERATION = (HERE / "tests" / "generation" / "test_utils.py").exists()
if not HAS_GENERATION:
    stand_in("tests.generation", __path__=[])
    stand_in(
        "tests.generation.test_utils",
        GenerationTesterMixin=type("GenerationTesterMixin", (), {}),
    )


#: Under which names the mixins look for what a model has labels for; as with the Auto classes.
LISTED = {
    "MODEL_MAPPING_NAMES": {
        "attlas-decoder": "DecoderModel", "attlas-encoder": "Encoder", "attlas-vit": "ViTModel",
    },
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {"attlas-decoder": "Decoder"},
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": {"attlas-encoder": "EncoderForMaskedLM"},
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": {
        "attlas-encoder": "EncoderForSequenceClassification",
    },
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": {"attlas-vit": "ViT"},
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": {"attlas-seq2seq": "Seq2Seq"},
}  # fmt: skip
for mapping, names in LISTED.items():
    getattr(modeling_auto, mapping).update(names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = skips.reason(item.cls.__name__, item.originalname)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header() -> str:
    mixins = "common, training" + (", generation" if HAS_GENERATION else "")
    return f"Transformers' mixins: {mixins} ({HERE})"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts of passed, failed and skipped, by model."""
    counts: dict[str, dict[str, int]] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            name = report.nodeid.split("::")[1]
            counts.setdefault(name, {}).setdefault(outcome, 0)
            counts[name][outcome] += 1
    for name, each in sorted(counts.items()):
        line = ", ".join(f"{each.get(o, 0)} {o}" for o in ("passed", "failed", "skipped"))
        terminalreporter.write_line(f"{name}: {line}")
    if not HAS_GENERATION:
        terminalreporter.write_line(
            "The generation mixin did not run: the source distribution does not hold it. "
            "HF_CHECKOUT=<a checkout of Transformers> adds it."
        )
