"""On a GPU the same as on the CPU."""

import pytest
import torch

import attlas
import tiny_models
from attlas.attach import attach
from attlas.cache.prompt import prefill
from attlas.contract.families import distinct
from attlas.hf.caches import cache_of, with_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
POLICIES = {
    "streaming-llm": {"rerotate": True, "while_decoding": True},
    "key-norm-eviction": {"skip_layers": ()},
    "snapkv": {"window": 4},
    "expected-attention": {"while_decoding": True},
}
RECORDERS = ("entropy", "sink-mass", "mean-distance", "top-links", "column-sums", "weights")


@pytest.mark.parametrize(
    "kind", distinct("rotary", "windows", "soft-caps", "sinks", having=["full"])
)
@pytest.mark.parametrize("name", POLICIES)
def test_policies_and_recorders(name, kind):
    model, ids = tiny_models.decoder(kind), tiny_models.prompt()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    found = {}
    for device in ("cpu", "cuda"):
        model, ids, mask = model.to(device), ids.to(device), mask.to(device)
        policy = attlas.make(name, keep=0.5, **POLICIES[name])
        with torch.no_grad(), attach(model, policy, record=RECORDERS) as session:
            cache = cache_of(model(ids, attention_mask=mask))
            longer = torch.cat([mask, torch.ones_like(mask[:, :2])], dim=1)
            later = tiny_models.prompt(2, 2, seed=3).to(device)
            logits = model(later, **with_cache(model, cache), attention_mask=longer).logits
        found[device] = [logits, *(session[r] for r in RECORDERS if r != "top-links")]
        assert session["top-links"]["index"].device.type == device
    for one, two in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(two.cpu(), one, atol=2e-3, rtol=1e-2)


def test_forks():
    model, ids = tiny_models.decoder("llama").cuda(), tiny_models.prompt(1, 24).cuda()
    policy = attlas.make("expected-attention", keep=0.5)
    prompt = prefill(model, ids, [policy], chunk=10)
    for used in (policy, None):
        with torch.no_grad(), attach(model, *([used] if used else [])):
            assert model(ids[:, :1], **with_cache(model, prompt.fork(used))).logits.isfinite().all()
