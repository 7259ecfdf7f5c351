"""Adapter of path patching to published scores on a random model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attlas.analyses.circuit_reuse import PathPatching
from attlas.contract.cases import Case, Check, adapter
from attlas.errors import UserError
from attlas.hf.models import AutoModelForCausalLM, config_class
from attlas.inspect.prompts import Prompts
from attlas.inspect.runs import differences, logits_with
from attlas.inspect.subject import Subject

ACTIVATIONS = {"exact gelu (erf)": "gelu", "gelu": "gelu", "gelu_new": "gelu_new", "relu": "relu"}


def model_of(case: Case) -> torch.nn.Module:
    """The case's model as a GPT-2."""
    c, p = case.config, case.params
    assert c["d_head"] * c["heads"] == c["d_model"], "GPT-2's heads are as wide as the model together"
    case.states(norm="pre-LayerNorm with scale w and bias b, eps 1e-5; final LayerNorm")
    case.without_effect("config.seed")  # of weights and tokens, which are given
    config = config_class("GPT2Config")(
        vocab_size=c["vocab"], n_positions=len(p["pos_embed.W_pos"]), n_embd=c["d_model"],
        n_layer=c["layers"], n_head=c["heads"], n_inner=c["d_mlp"], layer_norm_epsilon=1e-5,
        activation_function=ACTIVATIONS[c["act"]], tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    stack = model.transformer
    # The head has no bias there; it is one more logit-wide vector behind the same matrix.
    model.lm_head = torch.nn.Linear(c["d_model"], c["vocab"])
    pairs = [
        (stack.wte.weight, p["embed.W_E"]), (stack.wpe.weight, p["pos_embed.W_pos"]),
        (stack.ln_f.weight, p["ln_final.w"]), (stack.ln_f.bias, p["ln_final.b"]),
        (model.lm_head.weight, p["unembed.W_U"].T), (model.lm_head.bias, p["unembed.b_U"]),
    ]  # fmt: skip
    for number, block in enumerate(stack.h):
        own = f"blocks.{number}."
        attention = {f"{kind}_{x}": p[f"{own}attn.{kind}_{x}"] for kind in "Wb" for x in "QKVO"}
        projected = [attention[f"W_{x}"].transpose(0, 1).flatten(1) for x in "QKV"]
        pairs += [
            (block.attn.c_attn.weight, torch.cat(projected, dim=1)),
            (block.attn.c_attn.bias, torch.cat([attention[f"b_{x}"].flatten() for x in "QKV"])),
            (block.attn.c_proj.weight, attention["W_O"].flatten(0, 1)),
            (block.attn.c_proj.bias, attention["b_O"]),
            (block.mlp.c_fc.weight, p[f"{own}mlp.W_in"]), (block.mlp.c_fc.bias, p[f"{own}mlp.b_in"]),
            (block.mlp.c_proj.weight, p[f"{own}mlp.W_out"]),
            (block.mlp.c_proj.bias, p[f"{own}mlp.b_out"]),
        ]  # fmt: skip
        for ours, theirs in ((block.ln_1, "ln1"), (block.ln_2, "ln2")):
            pairs += [(ours.weight, p[f"{own}{theirs}.w"]), (ours.bias, p[f"{own}{theirs}.b"])]
    for ours, theirs in pairs:
        ours.data.copy_(theirs)
    return model


@adapter("path-patching", mechanism="path-patching")
def random_model(case: Case) -> Iterator[Check]:
    """Scores of every sender."""
    c, model = case.config, model_of(case)
    case.states(position=-1)
    tokens, patch = case.inputs["tokens"].long(), case.inputs["patch_tokens"].long()
    case.sizes(tokens, "B T")
    prompts = Prompts(tokens, patch, case.inputs["answers"].long())
    yield case.compare("out.logits_last", logits_with(model, tokens)[:, -1])
    clean, corrupted = differences(model, prompts)
    yield case.compare("out.logit_diff", clean)
    yield case.compare("out.logit_diff_patch", corrupted)
    yield case.compare("out.path_patching", scores(model, prompts, c, case.outs["path_patching"]))


def scores(model: torch.nn.Module, prompts: Prompts, c: dict, like: Tensor) -> Tensor:
    """Ours, of the senders that the published code looks at."""
    receivers, through = [tuple(r) for r in c["receivers"]], c["component"]
    layers = len(like)
    if any(head is None for _, head in receivers):
        if len(receivers) != 1:
            raise UserError("config 'receivers': one hook at a time, or heads")
        hook = str(receivers[0][0]).removeprefix("blocks.")
        number, _, point = hook.partition(".")
        at = {"hook_resid_pre": 0, "hook_resid_post": 1}.get(point)
        if at is None:
            raise UserError(
                f"config 'receivers' is {receivers}; the adapter takes resid_pre and resid_post"
            )
        layer = int(number) + at
        given = None if layer == layers else ((layer, -1),)
        look = PathPatching(receivers=given, through="residual", freeze_mlps=c["freeze_mlps"]).look
        return look(Subject(model, prompts=prompts)).heads["path effect"].values
    if through == "z":
        return torch.zeros_like(like)  # there what was heard is overwritten in place by what is frozen
    look = PathPatching(receivers=tuple(receivers), through=through, freeze_mlps=c["freeze_mlps"]).look
    found = look(Subject(model, prompts=prompts)).heads["path effect"].values
    found[min(layer for layer, _ in receivers) + 1 :] = 0.0  # not looked at there
    return found
