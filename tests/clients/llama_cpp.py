"""GGUF, the files of llama.cpp; what its converter's source says."""

from clients.client import Client


CLIENT = Client(
    tool="llama.cpp (GGUF)",
    requirements=("gguf==0.19.0",),
    use="Not possible. A GGUF file has tensors and no computation: llama.cpp has a graph written in C++ for each "
    "architecture, and its converter refuses architectures that it does not know.",
    source="`convert_hf_to_gguf.py` looks architectures up by name and refuses others, ours among them: "
    "`Architecture ... not supported!`",
)
