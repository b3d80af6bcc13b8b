"""What vLLM loads in each of its processes, by an entry point of the group `vllm.general_plugins`."""


def load() -> None:
    """Nothing is left to do: importing the package has registered every family with transformers.

    vLLM then finds the class of a model where it looks for those of transformers, and runs it in its Transformers
    backend. It imports this module where an error is logged and no other model is kept from being served.
    """
