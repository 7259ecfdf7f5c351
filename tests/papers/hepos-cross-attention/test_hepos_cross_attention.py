"""hepos-cross-attention: heads share a source out among them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attlas
from attlas import masks
from attlas.layers.sparse import hepos

GENERATOR = torch.Generator().manual_seed(0)
X, SOURCE = (torch.randn(2, n, 32, dtype=torch.float64, generator=GENERATOR) for n in (5, 23))


def _layer(**options):
    torch.manual_seed(0)
    options = {"dim": 32, "heads": 8, "stride": 4, **options}
    return attlas.make("hepos-cross-attention", **options).double().eval()


@pytest.mark.parametrize("kv_heads", [8, 4, 1])
def test_hepos_cross_attention_reads_every_position_by_its_share_of_heads(kv_heads: int) -> None:
    layer = _layer(kv_heads=kv_heads)
    weights = layer.weights(X, SOURCE)
    assert ((weights > 0).sum(1) == 2).all(), "H / s heads"
    for head in range(8):
        at = torch.arange(23) % 4 == head % 4
        assert (weights[:, head, :, at] > 0).all()
    valid = torch.ones(2, 23, dtype=torch.bool)
    valid[0, 11:], valid[1, 20:] = False, False
    for mask in (None, valid, masks.full):
        *prepared, inputs = layer.prepare(X, SOURCE, mask)
        q, k, v = prepared
        wanted = layer.aggregate(layer.weigh(q, k, inputs), v, inputs)
        torch.testing.assert_close(layer.attend(q, k, v, inputs), wanted)
    short = layer(X, SOURCE[:, :3])  # a quarter of the heads has nothing to read
    assert short.isfinite().all()


def test_hepos_cross_attention_with_stride_one_is_full() -> None:
    layer, plain = _layer(stride=1), attlas.make("softmax", dim=32, heads=8).double()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(X, SOURCE), plain(X, SOURCE))


def test_hepos_cross_attention_takes_a_share_of_the_memory(monkeypatch) -> None:
    """Pairs, keys and values of all heads fall by s."""
    met: list[tuple[int, int]] = []
    real = hepos.ops.attend

    def counted(q, k, v, **options):
        met.append((q.shape[1] * q.shape[2] * k.shape[2], k.numel() + v.numel()))
        return real(q, k, v, **options)

    monkeypatch.setattr(hepos.ops, "attend", counted)
    source, full = torch.randn(1, 512, 32).double(), {}
    for stride in (1, 2, 4, 8):
        met.clear()
        _layer(stride=stride)(X[:1], source)
        full[stride] = [sum(numbers) for numbers in zip(*met, strict=True)]
        assert [n * stride for n in full[stride]] == full[1]


def test_hepos_cross_attention_blocks_of_its_pattern_are_told_right() -> None:
    """`some` and `every` of a grid, against all pairs."""
    for stride, size in ((1, 3), (3, 2), (4, 4), (4, 1)):
        pattern = hepos.Dealt(stride, 12)
        some, every = masks.grid(pattern, 8, 24, q_block=4, k_block=size)
        pairs = masks.dense(pattern, 8, 24).reshape(1, 12, 2, 4, 24 // size, size)
        assert torch.equal(some.expand(1, 12, 2, -1), pairs.any(-1).any(3))
        assert torch.equal(every.expand(1, 12, 2, -1), pairs.all(-1).all(3))


def test_hepos_cross_attention_refuses_what_it_cannot_do() -> None:
    for options in ({"heads": 6}, {"stride": 0}, {"causal": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            _layer(**options)


def test_hepos_cross_attention_in_a_summariser_beside_sparse_encoders() -> None:
    """Local, strided and clustered encoders go with it in one model."""
    from attlas.models.seq2seq import Seq2Seq, Seq2SeqConfig

    for encoder in (
        {"name": "window", "size": 8}, {"name": "strided", "stride": 4},
        {"name": "routing-transformer", "clusters": 4},
    ):  # fmt: skip
        config = Seq2SeqConfig(
            vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            attention="softmax", encoder_attention=encoder,
            cross_attention={"name": "hepos-cross-attention", "stride": 4},
        )  # fmt: skip
        model = Seq2Seq(config)
        ids = torch.randint(3, 20, (2, 40))
        loss = model(input_ids=ids, decoder_input_ids=ids[:, :5], labels=ids[:, 1:6]).loss
        loss.backward()
        assert loss.isfinite()


class _Reader(nn.Module):
    """Answers questions about a document by one cross-attention."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.key, self.value = nn.Embedding(17, 32), nn.Embedding(17, 32)
        self.attention = attlas.make("hepos-cross-attention", dim=32, heads=4, stride=stride)
        self.head = nn.Linear(32, 17)

    def forward(self, document: Tensor, asked: Tensor) -> Tensor:
        source = self.key(document[..., 0]) + self.value(document[..., 1])
        return self.head(self.attention(self.key(asked), source))


def _documents(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Fillers (0, 0) with eight facts of sixteen kinds planted among them; the facts asked for."""
    keys = 1 + torch.rand(rows, 16, generator=generator).argsort(-1)[:, :8]
    values = torch.randint(1, 17, (rows, 8), generator=generator)
    places = torch.rand(rows, length, generator=generator).argsort(-1)[:, :8, None].expand(-1, -1, 2)
    facts = torch.stack((keys, values), dim=-1)
    return torch.zeros(rows, length, 2, dtype=torch.long).scatter(1, places, facts), keys, values


@pytest.mark.parametrize("stride", [2, 4])
def test_hepos_cross_attention_recalls_facts_that_truncation_loses(stride: int) -> None:
    """At the memory of 16 tokens read by all heads: documents of 16 s tokens, cut or dealt out."""
    recall = {}
    for way, own in (("dealt", stride), ("cut", 1)):
        torch.manual_seed(0)
        model, generator = _Reader(own), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        kept = 16 * own
        for _ in range(300):
            document, asked, wanted = _documents(32, 16 * stride, generator)
            loss = cross_entropy(model(document[:, :kept], asked).flatten(0, 1), wanted.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        document, asked, wanted = _documents(256, 16 * stride, torch.Generator().manual_seed(1))
        with torch.no_grad():
            right = model(document[:, :kept], asked).argmax(-1) == wanted
        recall[way] = right.float().mean().item()
    assert recall["cut"] < 1 / stride + 0.1
    assert recall["dealt"] > 0.95
