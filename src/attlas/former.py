"""Former names: what was called otherwise once is found under its present name, which a warning tells.

Mechanisms and options keep theirs where they are declared (`former=`). Here stand those of Python: what
is read goes on working; a subclass that defines one is refused, since nothing would call it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

#: By class, members that subclasses defined under these names.
MEMBERS: Mapping[str, Mapping[str, str]] = {
    "Attention": {
        "has_causal_form": "supports = Supports(causal=...)",
        "has_two_sided_form": "supports = Supports(bidirectional=...)",
        "has_cross_form": "supports = Supports(cross=...)",
        "has_own_position": "supports = Supports(position=...)",
        "needs_earlier_queries": "supports = Supports(queries='earlier')",
        "takes_masks": "supports = Supports(masks=...)",
        "memory_law": "supports = Supports(memory=...)",
        "extras": "supports = Supports(extras=...)",
        "stages": "changes",
        "build": "make_projections(), or setup() for what else the layer is made of",
        "adopt": "load_from",
    },
    "Part": {"stages": "changes"},
    "CachePart": {"settle": "compress"},
}
#: By class, attributes that were read under these names.
ATTRIBUTES: Mapping[str, Mapping[str, str]] = {
    "Call": {
        "columns": "original_positions", "head_columns": "head_original_positions", "real": "valid",
        "step": "forward_pass",
    },
    "Site": {"step": "forward_pass"},
    "ForwardPass": {"real": "valid"},
}  # fmt: skip


def tell(was: str, now: str) -> None:
    """Warn that something is called otherwise now."""
    warnings.warn(f"{was} is called {now!r} now", FutureWarning, stacklevel=4)


def refuse_members(cls: type) -> None:
    """Refuse a subclass that defines what is called otherwise now.

    Raises:
        TypeError: with the present name.
    """
    for base in cls.__mro__[1:]:
        for name, now in MEMBERS.get(base.__name__, {}).items():
            if name in vars(cls) and not hasattr(base, name):
                raise TypeError(f"{cls.__name__}.{name}: it is {now} now")


def attribute(owner: object, name: str) -> object:
    """The attribute that `owner` once had under this name.

    Raises:
        AttributeError: it never had one.
    """
    kind = type(owner).__name__
    now = ATTRIBUTES.get(kind, {}).get(name)
    if now is None:
        raise AttributeError(f"{kind!r} object has no attribute {name!r}")
    tell(f"{kind.lower()}.{name}", now)
    return getattr(owner, now)
