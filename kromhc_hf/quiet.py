"""Keeps what other packages log while they are imported, and their progress bars, off the screen of our commands."""

import logging


# torchao names each of its libraries that was built for another machine, torch each enumeration of torchao, and
# bitsandbytes a package with faster kernels.
NOISY = (
    *("torchao", "torch.utils._pytree", "torch.distributed.elastic.multiprocessing.redirects"),
    "bitsandbytes.backends.cpu.ops",
)


def quiet() -> None:
    """Before torch is imported; transformers says errors alone afterwards, and draws no bars."""
    for name in NOISY:
        logging.getLogger(name).addFilter(lambda record: False)
    # It imports neither torch nor a family.
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
