"""What the row of BERT's attention in numbers says, clause by clause."""

from __future__ import annotations

import math

import pytest
import torch

import attlas
from attlas.parts.record.bert_attention_statistics import Probe, distances, statistics


def test_contract():
    assert [r for r in attlas.check("bert-attention-statistics") if r.status == "failed"] == []


def test_known_heads_have_known_numbers():
    n = 8
    shift = torch.eye(n).roll(1, 1)  # the last token attends to the first
    even = torch.full((n, n), 1 / n)
    delimiter = torch.zeros(n, n).index_fill(1, torch.tensor([n - 1]), 1.0)
    sep = torch.arange(n) == n - 1
    found = statistics(torch.stack([shift, even, delimiter]), {"sep": sep})
    assert torch.allclose(found["right"], torch.tensor([(n - 1) / n, (n - 1) / n**2, 1 / n]))
    assert torch.allclose(found["self"], torch.tensor([0.0, 1 / n, 1 / n]))
    assert torch.allclose(found["sep"], torch.tensor([1 / n, 1 / n, 1.0]))
    assert float(found["entropy"][1]) == pytest.approx(math.log(n), abs=1e-5)
    assert float(found["entropy"][[0, 2]].max()) < 2e-3
    apart = distances(torch.stack([shift, shift, delimiter]))
    assert float(apart[0, 1]) < 1e-5
    assert float(apart[0, 2]) == pytest.approx((n - 1) * math.log(2), rel=0.02)


def test_probe_recovers_a_planted_head():
    torch.manual_seed(0)
    documents = []
    for _ in range(40):
        maps = torch.randn(6, 12, 12).mul(2).softmax(-1)
        determiners = torch.randperm(11)[:4]
        nouns = determiners + 1
        maps[3, determiners] = 0.1 / 12
        maps[3, determiners, nouns] += 0.9
        documents.append((maps, determiners, nouns))
    probe = Probe(6).fit(documents[:20])
    right = torch.cat([probe.predict(maps)[j] == i for maps, j, i in documents[20:]])
    assert float(right.float().mean()) > 0.95
