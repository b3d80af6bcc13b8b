# Code of kromhc-hf, which travels with every model that it saves.
"""The options of hyper-connections, each declared once: its type, default and documentation; torch is not imported.

Configurations, keyword arguments, the command line, adapters and studies are made from `OPTIONS`. To add an option, add
a field to `BranchKeywords` (what every hyper-connection reads) or `StreamKeywords`, and whatever consumes it.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypedDict, get_args, get_type_hints

from .stream_blocks import read_recompute
from .stream_layers import Ends, read_ends


# The variants of `variants.py`, the generators of `generators.py` and the readouts of `stream_ends.py`.
VARIANT_NAMES = ("kromhc", "identity", "mhc", "mhc_lite", "tbp", "hc", "one_sided", "circulant", "go_mhc", "orthogonal")
GENERATOR_NAMES = ("dense", "cp")
READOUT_NAMES = ("mean", "sum", "norm_sum", "softmax", "sigmoid", "attention")
READS = ("weights", "gated")
INITS = ("identity", "paper")
# Added to mean squares.
EPS = 1e-6
SINKHORN_ITERATIONS = 20


class Option(NamedTuple):
    """What is known about an option beside its name.

    Args:
        default: its value where none is given.
        help: what it does, in one line.
        choices: the values that it may have, if they are names.
        flags: other ways to spell it on the command line; of an option that is on by default, what turns it off.
        read: makes of a value, such as text of the command line or a list of a file, the one that is kept, or raises
            ValueError; the type is not checked then.
        running: whether it is about how a model is run alone: it may change on a live model, and layers that differ in
            it go together.
        kind: its type, filled in from the field.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    read: Callable[[Any], Any] | None = None
    running: bool = False
    kind: Any = object


class BranchKeywords(TypedDict, total=False):
    """The options that every hyper-connection reads, as keyword arguments."""

    variant: Annotated[str, Option("kromhc", "How the mixing matrix is parametrised.", VARIANT_NAMES)]
    init: Annotated[
        str, Option("identity", "identity keeps the function of pretrained weights, paper is for training anew.", INITS)
    ]
    dynamic: Annotated[
        bool, Option(True, "Whether the mappings depend on the token; if not, they are biases.", flags=("--static",))
    ]
    residual_logit: Annotated[
        float, Option(4.0, "How strongly mixing leans towards the identity at first, with init identity.")
    ]
    eps: Annotated[float, Option(EPS, "Added to the mean square in the norm of the hyper-connections.")]
    sinkhorn_iterations: Annotated[
        int, Option(SINKHORN_ITERATIONS, "How often variant mhc normalises rows and columns.")
    ]
    generator: Annotated[
        str, Option("dense", "How the weight of the mappings is stored; cp is factors of low rank.", GENERATOR_NAMES)
    ]
    generator_rank: Annotated[int, Option(2, "How many products of factors the generator cp adds up.")]
    read: Annotated[
        str, Option("weights", "How a branch reads the streams; gated adds a gate for every channel of each.", READS)
    ]
    read_rank: Annotated[int, Option(16, "Width of the layer inside the gates of read gated.")]


class StreamKeywords(BranchKeywords, total=False):
    """All options of hyper-connections, as keyword arguments."""

    num_streams: Annotated[int, Option(4, "Number n of residual streams; 1 is the plain model.", flags=("-n",))]
    readout: Annotated[
        str, Option("mean", "How the streams are joined; norm_sum follows the final norm.", READOUT_NAMES)
    ]
    stream_embedding: Annotated[
        bool, Option(False, "Whether each stream gets a learned embedding where it is made, zero at first.")
    ]
    layers: Annotated[
        Ends | str | None,
        Option(None, "Decoder layers with streams, a slice such as 8:12 or -4:; by default all.", read=read_ends),
    ]
    stream_recompute: Annotated[
        str | int,
        Option(
            "none",
            "Which streams training keeps and does not compute again: all (none), those of each layer (layer), or of "
            "every so many layers (a number, or auto).",
            read=read_recompute,
            running=True,
        ),
    ]


# Functions take these by position as well.
POSITIONAL = ("num_streams", "variant")


def options_of(keywords: type) -> dict[str, Option]:
    parts = {name: get_args(hint) for name, hint in get_type_hints(keywords, include_extras=True).items()}
    ordered = dict.fromkeys((*(name for name in POSITIONAL if name in parts), *parts))
    return {name: parts[name][1]._replace(kind=parts[name][0]) for name in ordered}


BRANCH_OPTIONS = options_of(BranchKeywords)
OPTIONS = options_of(StreamKeywords)


def check_choice(name: str, value: object) -> None:
    """Refuses a value that is none of the names that an option may have.

    Raises:
        ValueError: with those names.
    """
    choices = OPTIONS[name].choices
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def described_option(option: Option) -> str:
    """What an option does, and the names that it may have."""
    return f"{option.help} One of {', '.join(option.choices)}." if option.choices else option.help
