"""GGUF, the files of llama.cpp."""

from clients.client import Client


CLIENT = Client(
    tool="llama.cpp (GGUF)",
    requirements=("llama-cpp",),
    use="Not possible. A GGUF file has tensors and no computation: llama.cpp has a graph written in C++ for each "
    "architecture, and none has several residual streams. Take the hyper-connections out only where they were never "
    "trained: that is the base.",
    source="`convert_hf_to_gguf.py` knows architectures by name and refuses others: `Architecture "
    "'KromHCLlamaForCausalLM' not supported!`",
)
