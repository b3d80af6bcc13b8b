"""LLaMA-Factory: not run, since it cannot be imported without CUDA."""

from clients.client import Client


CLIENT = Client(
    tool="LLaMA-Factory",
    requirements=("llamafactory==0.9.5",),
    use="`trust_remote_code: true` and `template: default`, or the template of the family, in its configuration.",
    source="it installs beside this package with transformers 5.6.0, but imports torchaudio, whose builds on the index "
    "want CUDA libraries, so nothing was run. It loads models through the Auto classes with `trust_remote_code` of its "
    "configuration (`model/loader.py`)",
)
