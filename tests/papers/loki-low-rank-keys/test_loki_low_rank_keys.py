"""loki-low-rank-keys: components are the keys', all give logits, and few hold most of the keys."""

import pytest
import torch

import tiny_models
from attlas.attach import attach
from attlas.attach.part import Part
from attlas.calibration import calibrate, windows
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.select.loki import KeyComponents, Loki
from attlas.storage.rotary import Rotary


class Keys(Part):
    """Holds the keys of every layer, one text after the other."""

    def __init__(self):
        self.seen = {}

    def observe(self, call):
        self.seen.setdefault(call.layer, []).append(call.k)


@pytest.mark.parametrize("rotary", ["after", "before"])
def test_components_are_the_keys_principal_ones(rotary):
    model, texts = tiny_models.decoder("llama"), [tiny_models.prompt(1, 60, seed=n) for n in (2, 3)]
    found = calibrate(model, Loki(keep=0.5, rotary=rotary), texts).tensors
    watch = Keys()
    with torch.no_grad(), attach(model, watch):
        for ids in texts:
            model(ids, use_cache=False)
    for layer, keys in watch.seen.items():
        if rotary == "before":
            plain = Rotary.plain(16, 10000.0)
            positions = [torch.arange(k.shape[2])[None] for k in keys]
            keys = [plain.rotate(k, -at) for k, at in zip(keys, positions, strict=True)]
        rows = torch.cat(keys, dim=2)[0].double()
        centred = rows - rows.mean(1, keepdim=True)
        _, sizes, right = torch.linalg.svd(centred, full_matrices=False)
        variance = sizes.square() / rows.shape[1]
        torch.testing.assert_close(
            found[f"{layer}.variance"].double(), variance, atol=1e-6, rtol=1e-4
        )
        same = (found[f"{layer}.components"].double() * right.mT).sum(-2).abs()
        torch.testing.assert_close(same, torch.ones_like(same), atol=1e-4, rtol=0)


def test_all_components_choose_the_largest_logits():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 40)
    part = Loki(tokens=6, rank=1.0, block=1)
    part.calibration = calibrate(model, part, [tiny_models.prompt(1, 60)])
    chosen = []

    class Watch(Part):
        def observe(self, call):
            if call.chosen is not None:
                body = call.cache_layer.bodies["packed"]
                keys = body.read()[0][:, :, : call.chosen.slots].repeat_interleave(2, dim=1)
                top = (call.q @ keys.mT)[:, :, 0].topk(6).indices.sort().values
                chosen.append(torch.equal(call.chosen.index.long(), top))

    with torch.no_grad(), attach(model, Watch(), part):
        cache = cache_of(model(ids, use_cache=True))
        for token in ids[0, :3].split(1):
            model(token[None], **with_cache(model, cache))
    assert chosen == [True] * 12


def test_padding_does_not_calibrate():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for rotary in ("after", "before"):
        padded, alone = KeyComponents(rotary), KeyComponents(rotary)
        with torch.no_grad(), attach(model, padded):
            model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        with torch.no_grad(), attach(model, alone):
            model(ids[:1, 9:], use_cache=False)
            model(ids[1:], use_cache=False)
        for name, total in alone.sums.items():
            torch.testing.assert_close(padded.sums[name], total, atol=1e-3, rtol=1e-4)


def test_loki_low_rank_keys_lie_in_few_dimensions(smollm2):
    model, tokenizer = smollm2
    texts = windows(tokenizer, tokens=600, length=300)
    for rotary in ("before", "after"):
        found = calibrate(model, Loki(keep=0.25, rotary=rotary), texts).tensors
        shares = torch.stack([found[f"{i}.variance"] for i in range(30)])
        shares = shares.cumsum(-1) / shares.sum(-1, keepdim=True)
        dimensions = (shares < 0.9).sum(-1) + 1
        assert dimensions.max() < 64
