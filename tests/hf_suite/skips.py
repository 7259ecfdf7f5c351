"""Every test of Transformers' mixins that is not run on our models, with the reason."""

from __future__ import annotations

import re

#: (pattern of test classes, pattern of tests): why.
SKIPS: dict[tuple[str, str], str] = {
    (r"(Softmax|Recurrent|Differential|Hybrid)DecoderTest|Seq2SeqTest", "test_bc_cache_name_forward"): (
        "wants a warning of past_key_values; our models take both names in all versions, without one"
    ),
    ("Seq2SeqTest", "test_model_base_model_prefix"): (
        "has no base model: the blocks of the decoder stand beside its output layer"
    ),
    ("(Recurrent|Hybrid)DecoderTest", "test_assisted_decoding_.*"): (
        "a state cannot be taken back: refused at once, as tests/models/test_asked_for.py has it; "
        "the mixin asks the class, and ours tells by its layers"
    ),
    ("(Recurrent|Hybrid)DecoderTest", "test_(greedy|beam_search)_generate_dict_outputs_use_cache"): (
        "asks for maps at every step; a state tells them no more, which is refused by name"
    ),
    ("(Recurrent|Differential|Hybrid)DecoderTest", "test_retain_grad_hidden_states_attentions"): (
        "wants gradients of the map; these layers have a route to their output that makes no map"
    ),
    ("(HF)?ViTTest", "test_model_get_set_embeddings"): (
        "wants an Embedding of tokens; patches are embedded by a convolution"
    ),
}


def reason(of_class: str, test: str) -> str | None:
    """Why a test is skipped, or None for one that runs."""
    for (classes, tests), why in SKIPS.items():
        if re.fullmatch(classes, of_class) and re.fullmatch(tests, test):
            return why
    return None
