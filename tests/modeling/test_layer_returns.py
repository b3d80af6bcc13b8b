"""What layers return behind their hidden states: read from their source, and held against what they do return."""

import inspect
import itertools

import pytest

from kromhc_hf.modeling.layer_returns import returned_beside, returned_values


class Layer:
    """Modules that return words in place of tensors; forwards below as releases and repositories have written them."""

    wide, kind = False, "full"

    def attention(self, hidden_states):
        return ("attended", "weights", "cache", "bias")

    def experts(self, hidden_states):
        return ("mixed", "router_logits")


class Alone(Layer):
    def forward(self, hidden_states, cache=None):
        hidden_states, _, _, _ = self.attention(hidden_states)
        return hidden_states


class Sum(Layer):
    def forward(self, hidden_states):
        attended, *_ = self.attention(hidden_states)
        return attended + hidden_states


class Pair(Layer):
    def forward(self, hidden_states):
        hidden_states, weights, *_ = self.attention(hidden_states)
        return hidden_states, weights


class Third(Layer):
    def forward(self, hidden_states):
        hidden_states, _, indices, _ = self.attention(hidden_states)
        return hidden_states, indices


class Wrapped(Layer):
    def forward(self, hidden_states):
        return (hidden_states,)


class Sliced(Layer):
    def forward(self, hidden_states):
        attention_outputs = self.attention(hidden_states)
        outputs = (attention_outputs[0],) + attention_outputs[1:]
        return outputs


class OfTwoModules(Layer):
    def forward(self, hidden_states):
        hidden_states, weights, _, _ = self.attention(hidden_states)
        hidden_states, router_logits = self.experts(hidden_states)
        return hidden_states, weights, router_logits, None


class HandedBack(Layer):
    """What flash-linear-attention does: one argument is returned as it was, or changed where an attribute says so."""

    def forward(self, hidden_states, mask=None, states=None):
        if self.wide:
            states = [hidden_states]
        hidden_states, weights, cache, _ = self.attention(hidden_states)
        if self.wide:
            hidden_states = hidden_states + states[0]
        outputs = (hidden_states, weights, cache, states)
        return outputs


class Appended(Layer):
    """What most repositories on the Hub do."""

    def forward(self, hidden_states, output_attentions=False, use_cache=False):
        hidden_states, weights, present, _ = self.attention(hidden_states)
        outputs = (hidden_states,)
        if output_attentions:
            outputs += (weights,)
        if use_cache:
            outputs = outputs + (present,)
        return outputs


class Chosen(Layer):
    """What early GPTs did."""

    def forward(self, hidden_states, use_cache=False):
        attention_outputs = self.attention(hidden_states)
        hidden_states = attention_outputs[0]
        outputs = attention_outputs[1:]
        if use_cache:  # noqa: SIM108
            outputs = (hidden_states,) + outputs
        else:
            outputs = (hidden_states,) + outputs[1:]
        return outputs


class Early(Layer):
    def forward(self, hidden_states, quiet=True, other=None):
        hidden_states, weights, _, _ = self.attention(hidden_states)
        if not quiet:
            return hidden_states, weights, other
        with open(__file__):
            return (hidden_states,)


class Ternary(Layer):
    def forward(self, hidden_states, output_attentions=False):
        hidden_states, weights, _, _ = self.attention(hidden_states)
        outputs = (hidden_states, weights) if output_attentions else (hidden_states, None)
        return outputs


class ByKind(Layer):
    def forward(self, hidden_states):
        if self.kind == "full":
            hidden_states, weights, *_ = self.attention(hidden_states)
            return hidden_states, weights
        return hidden_states


READ = (Alone, Sum, Pair, Third, Wrapped, Sliced, OfTwoModules, HandedBack, Appended, Chosen, Early, Ternary, ByKind)


@pytest.mark.parametrize("cls", READ, ids=lambda cls: cls.__name__)
def test_what_is_read_is_what_the_forward_returns(cls):
    """With every argument given and not given."""
    layer, parameters = cls(), list(inspect.signature(cls.forward).parameters.values())[2:]
    outputs = {"attention": layer.attention(""), "experts": layer.experts("")}
    returned = returned_beside(layer, cls)
    for values in itertools.product(*((p.default, p.default is False, p.default is not True) for p in parameters)):
        arguments = {p.name: value for p, value in zip(parameters, values)}
        expected = layer.forward("hidden", **arguments)
        assert (returned is None) == isinstance(expected, str)
        assert returned is None or tuple(returned_values(returned, outputs, arguments)) == expected[1:]


def test_the_attributes_of_the_layer_decide():
    layer = ByKind()
    layer.kind = "linear"
    assert returned_beside(layer, ByKind) is None
    assert returned_beside(ByKind(), ByKind) is not None


class Both(Layer):
    def forward(self, hidden_states, flag=False):
        if flag:
            return hidden_states
        return (hidden_states,)


class Unknown(Layer):
    def forward(self, hidden_states):
        return hidden_states, self.router


class Called(Layer):
    def forward(self, hidden_states):
        return self.other(hidden_states)


class Changed(Layer):
    def forward(self, hidden_states, states=None):
        states = states + [hidden_states]
        return hidden_states, states


class InALoop(Layer):
    def forward(self, hidden_states, states=()):
        outputs = (hidden_states,)
        for state in states:
            outputs += (state,)
        return outputs


class ByValue(Layer):
    def forward(self, hidden_states, states=None):
        outputs = (hidden_states,)
        if states is not None and len(states) > 2:
            outputs += (states,)
        return outputs


class Nothing(Layer):
    def forward(self, hidden_states):
        hidden_states = self.attention(hidden_states)


@pytest.mark.parametrize("cls", [Both, Unknown, Called, Changed, InALoop, ByValue], ids=lambda cls: cls.__name__)
def test_a_return_that_is_not_understood_is_refused(cls):
    with pytest.raises(ValueError, match=rf"{cls.__name__}.forward must return its hidden states.*got .*return"):
        returned_beside(cls(), cls)


def test_a_forward_without_a_return_is_refused():
    with pytest.raises(ValueError, match="Nothing.forward must return .* got 'no return'"):
        returned_beside(Nothing(), Nothing)


def test_what_changes_where_an_attribute_says_so_is_refused_there():
    layer = HandedBack()
    layer.wide = True
    with pytest.raises(ValueError, match=r"HandedBack.forward must return .* got 'return outputs'"):
        returned_beside(layer, HandedBack)


def test_a_layer_without_its_source_is_refused():
    namespace: dict = {}
    exec("class Made:\n    def forward(self, hidden_states): return hidden_states", namespace)
    with pytest.raises(ValueError, match=r"source of Made.forward must be installed"):
        returned_beside(namespace["Made"](), namespace["Made"])
