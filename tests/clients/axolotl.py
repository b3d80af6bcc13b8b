"""axolotl: not run, since what it asks for has no builds that run without CUDA."""

from clients.client import Client


CLIENT = Client(
    tool="axolotl",
    requirements=("axolotl==0.21.0",),
    use="`trust_remote_code: true` in its configuration. Its plugin for Liger looks model types up in Liger's own "
    "table, which has ours once this package is imported.",
    source="it needs xformers and a torch with CUDA, so nothing was run. It loads models and tokenizers through the "
    "Auto classes with `trust_remote_code` of its configuration (`loaders/model.py`, `loaders/tokenizer.py`) and pins "
    "transformers 5.20.1, within our range",
)
