"""attlas: an atlas of attention, every mechanism behind one interface.

    attlas.make("differential-transformer", dim=512, heads=8)      build with one
    with attlas.attach(model, attlas.make("snapkv", keep=0.25)):    attach one to a pretrained model
    attlas.check(my_mechanism)                                       hold one to the contract
    attlas compare                                                    on the command line: side by side

Importing attlas changes nothing in torch or Transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attlas.catalog.registry import Reduction, make, mechanism
from attlas.options import option

if TYPE_CHECKING:
    from attlas.attach import Call, Part, attach
    from attlas.attention import Attention
    from attlas.cache.prompt import prefill
    from attlas.catalog.papers import papers
    from attlas.contract import check
    from attlas.models.convnet import ConvNet, ConvNetConfig
    from attlas.models.decoder import Decoder, DecoderConfig
    from attlas.models.encoder import Encoder, EncoderConfig
    from attlas.models.load import load
    from attlas.models.seq2seq import Seq2Seq, Seq2SeqConfig
    from attlas.models.swap import swap
    from attlas.models.vit import ViT, ViTConfig
    from attlas.supports import Supports

__version__ = "0.1.0"
__all__ = [
    "Attention",
    "Call",
    "ConvNet",
    "ConvNetConfig",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "Part",
    "Reduction",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Supports",
    "ViT",
    "ViTConfig",
    "attach",
    "check",
    "load",
    "make",
    "mechanism",
    "option",
    "papers",
    "prefill",
    "swap",
]

#: Names that need torch or Transformers, imported when they are first asked for.
_LATER = {
    "Attention": "attlas.attention",
    "Call": "attlas.attach",
    "ConvNet": "attlas.models.convnet",
    "ConvNetConfig": "attlas.models.convnet",
    "Decoder": "attlas.models.decoder",
    "DecoderConfig": "attlas.models.decoder",
    "Encoder": "attlas.models.encoder",
    "EncoderConfig": "attlas.models.encoder",
    "Part": "attlas.attach",
    "Seq2Seq": "attlas.models.seq2seq",
    "Seq2SeqConfig": "attlas.models.seq2seq",
    "Supports": "attlas.supports",
    "ViT": "attlas.models.vit",
    "ViTConfig": "attlas.models.vit",
    "attach": "attlas.attach",
    "check": "attlas.contract",
    "load": "attlas.models.load",
    "papers": "attlas.catalog.papers",
    "prefill": "attlas.cache.prompt",
    "swap": "attlas.models.swap",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'attlas' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
