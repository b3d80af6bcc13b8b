# Code of kromhc-hf, which travels with every model that it saves.
"""The values of the options in `option_table`, checked, and what is made from that table for whoever takes them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .generators import GENERATORS
from .mixing import Mixing
from .option_table import (
    BRANCH_OPTIONS,
    OPTIONS,
    POSITIONAL,
    BranchKeywords,
    Option,
    StreamKeywords,
    check_choice,
    described_option,
    options_of,
)
from .stream_ends import READOUTS
from .stream_layers import positions
from .variants import make_mixing


if TYPE_CHECKING:
    from typing import Unpack

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def documented(text: str | None, options: Mapping[str, Option]) -> str | None:
    """A docstring with one line for each option in the place of the line about `**options`."""
    lines: list[str] = []
    for line in (text or "").splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if line.lstrip().startswith("**options:"):
            lines += [f"{indent}{name}: {described_option(option)}" for name, option in options.items()]
        else:
            lines.append(line)
    return "\n".join(lines) if text else text


def with_option_fields(cls: type) -> type:
    """Gives a class, before it becomes a dataclass, a field for every option that it does not spell out itself.

    A line about `**options` in its documentation becomes a line for each of them.
    """
    own = inspect.get_annotations(cls)
    for name, option in OPTIONS.items():
        if name not in own:
            own[name] = option.kind
            settings: Any = {"kw_only": name not in POSITIONAL, "compare": not option.running}
            setattr(cls, name, field(default=option.default, **settings))
    cls.__annotations__ = own
    cls.__doc__ = documented(cls.__doc__, OPTIONS)
    return cls


@dataclass(frozen=True)
@with_option_fields
class StreamOptions:
    """A value for every option of hyper-connections, checked.

    Args:
        **options: see the table of options.

    Raises:
        ValueError: for a value that is not allowed, with the rule, the value and the way out.
    """

    if TYPE_CHECKING:

        def __init__(self, *positional: Any, **options: Unpack[StreamKeywords]) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        for name in OPTIONS:
            check_choice(name, getattr(self, name))
        self.mixing()
        for name, option in OPTIONS.items():
            value, default = getattr(self, name), f"The default is {option.default!r}."
            if option.read is not None:
                object.__setattr__(self, name, option.read(value))
                continue
            if option.kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
                object.__setattr__(self, name, value)
            if not isinstance(value, option.kind) or (isinstance(value, bool) and option.kind is not bool):
                raise ValueError(f"{name} must be of type {option.kind.__name__}; got {value!r}. {default}")
            if isinstance(value, float) and not isfinite(value):
                raise ValueError(f"{name} must be finite; got {value!r}. {default}")
        if self.eps < 0:
            raise ValueError(f"eps must not be negative; got {self.eps!r}. The default is {OPTIONS['eps'].default!r}.")
        for name in ("generator_rank", "read_rank"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}. The default is {OPTIONS[name].default}."
                )
        if self.read == "gated" and not self.dynamic:
            raise ValueError(
                "read must be 'weights' for static mappings, since gates depend on the token; got 'gated' with "
                "dynamic=False. Use read='weights', or dynamic=True."
            )
        GENERATORS[self.generator].check_defined_for(self.mixing())
        if self.init == "identity" and not READOUTS[self.readout].sums_to_one:
            raise ValueError(
                "init 'identity' keeps the function of the base model only if the readout weights sum to 1; "
                f"got readout {self.readout!r}. Use readout='mean', or init='paper' to train from scratch."
            )

    def mixing(self) -> Mixing:
        """The parametrisation of the mixing matrix."""
        return make_mixing(self.variant, self.num_streams, self.sinkhorn_iterations)

    def layers_of(self, number: int) -> range:
        """The positions of the layers with streams in a model of so many decoder layers.

        Raises:
            ValueError: if the model does not have them, or the readout needs the last layer and it is not among them.
        """
        found = positions(self.layers, number)
        if READOUTS[self.readout].after_norm and found[-1] != number - 1:
            raise ValueError(
                f"readout {self.readout!r} follows the final norm of the model, so the layers with streams must go up "
                f"to the last one, {number - 1}; got layers={self.layers!r}. Use layers='{found[0]}:', or "
                "readout='mean'."
            )
        return found

    def in_model(self, number: int) -> "StreamOptions":
        """The same options with `layers` counted from the first of so many decoder layers, see `layers_of`."""
        found = self.layers_of(number)
        ends = None if self.layers is None else (found[0], found[-1] + 1)
        return StreamOptions(**{**self.to_dict(), "layers": ends})

    def to_dict(self) -> dict[str, Any]:
        """The values by name."""
        return {name: getattr(self, name) for name in OPTIONS}

    def as_fields(self) -> dict[str, Any]:
        """The values under the names that they have in a configuration."""
        return {f"hc_{name}": value for name, value in self.to_dict().items()}

    def of_branch(self) -> BranchKeywords:
        """The options that a single hyper-connection takes, as keyword arguments."""
        values: Any = {name: getattr(self, name) for name in BRANCH_OPTIONS}
        return values

    def without_effect(self) -> dict[str, str]:
        """The options that nothing reads beside these values, and why: for those who must not drop any in silence."""
        if self.num_streams == 1:
            others = (name for name in OPTIONS if name != "num_streams")
            return dict.fromkeys(others, "the plain model, with one stream, has no hyper-connections")
        mixing, unread = self.mixing(), {}
        if mixing.doubly_stochastic != "by iteration":
            unread["sinkhorn_iterations"] = f"variant {self.variant!r} does not iterate"
        if self.init == "paper":
            unread["residual_logit"] = "init 'paper' has a residual logit of its own"
        elif torch.equal(mixing.initial_logits(1.0), mixing.initial_logits(2.0)):
            unread["residual_logit"] = f"variant {self.variant!r} starts at the identity itself"
        if not self.dynamic:
            unread |= dict.fromkeys(("generator", "generator_rank"), "static mappings have no weight")
        elif self.generator == "dense":
            unread["generator_rank"] = "generator 'dense' has no rank"
        if self.read == "weights":
            unread["read_rank"] = "read 'weights' has no gates"
        readout = READOUTS[self.readout].module
        if not self.dynamic and not (readout and readout.normed):
            unread["eps"] = "static mappings have no norm"
        return unread


def given_options(positional: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call that may have given the first ones by position, by name.

    Raises:
        TypeError: if there is no such option, too many are given by position, or one twice.
    """
    if len(positional) > len(POSITIONAL):
        raise TypeError(f"options must be given by name, all but {' and '.join(POSITIONAL)}; got {positional!r}.")
    if unknown := options.keys() - OPTIONS.keys():
        raise TypeError(f"the options are {', '.join(OPTIONS)}; got {', '.join(sorted(unknown))}.")
    by_position = dict(zip(POSITIONAL, positional))
    if twice := by_position.keys() & options.keys():
        raise TypeError(f"an option must be given once; got {', '.join(sorted(twice))} by position and by name.")
    return {**by_position, **options}


def show_options(keywords: type) -> Callable[[Decorated], Decorated]:
    """Shows every option in the signature and the documentation of a function that takes them as `**options`.

    Where the function takes anything by position too (`*positional`), the first options can be given that way.
    """
    options = options_of(keywords)

    def decorate(function: Decorated) -> Decorated:
        shown: Any = function
        signature = inspect.signature(function)
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        by_position = inspect.Parameter.VAR_POSITIONAL in kinds
        parameters = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for name, option in options.items():
            leading = by_position and name in POSITIONAL
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if leading else inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, kind, default=option.default, annotation=option.kind))
        shown.__signature__ = signature.replace(parameters=sorted(parameters, key=lambda parameter: parameter.kind))
        shown.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not p.empty}
        shown.__doc__ = documented(function.__doc__, options)
        return function

    return decorate
