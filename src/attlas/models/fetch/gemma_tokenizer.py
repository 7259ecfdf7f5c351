"""Gemma's tokenizer out of its GGUF file, alike under every version of Transformers.

Transformers' own reader makes it from 5.23 on as is done here; that of 5.17 splits words otherwise
and opens no text with <bos>, without which Gemma reads badly. The file lists pieces and no
merges, which BPE needs. A piece of number n stands for every cut of it into two pieces, and

    merges: (l, r) with l + r a piece, by rising number of l + r, longer l first

since pieces are numbered in the order in which training joined them, runs of line ends and of spaces
in front. (The file's scores, lower for these than for common words, give another order.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

#: Types of tokens in GGUF files that are matched before any merging.
CONTROL, USER_DEFINED = 3, 4
SPACE = "▁"


def read(file: Path) -> Any:
    """The tokenizer of a Gemma GGUF file, as Transformers uses it."""
    import gguf

    from attlas.hf.models import PreTrainedTokenizerFast

    fields = gguf.GGUFReader(file).fields

    def field(name: str) -> Any:
        return fields[f"tokenizer.ggml.{name}"].contents()

    # Runs of spaces stand as spaces in the file, while text is read with every space replaced.
    pieces = [
        piece.replace(" ", SPACE) if not piece.strip(" ") else piece for piece in field("tokens")
    ]
    special = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")
    bos, eos, unknown, padding = (pieces[field(name)] for name in special)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        BPE(
            vocabulary, merges(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=False, special=kind == CONTROL)
            for piece, kind in zip(pieces, field("token_type"), strict=True)
            if kind in (CONTROL, USER_DEFINED) and piece.strip(SPACE)
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token=unknown,
        pad_token=padding, padding_side="left",
    )  # fmt: skip


def merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, those that are joined first in front."""
    found = []
    for piece in sorted(vocabulary, key=vocabulary.__getitem__):
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((left, right))
    return found
