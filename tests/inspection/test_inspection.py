"""Recording models that generate, checkpoint or are compiled; inspections by hand and of checkpoints; the command."""

import json

import pytest
import torch
from support.handmade import IDENTITY, SWAP, UNIFORM, N, handmade, record
from support.runs import retrofitted
from support.tiny import configurations, make_model, separate_streams, token_ids

from kromhc_hf import BranchRecord, apply_hyper_connections, record_mappings
from kromhc_hf.inspection.inspection import (
    checkpoint_names,
    compared_sum_errors,
    inspect_checkpoints,
    inspect_model,
    token_variation,
)
from kromhc_hf.inspection.statistics import stream_statistics
from kromhc_hf.inspection.tables import total_rows


def equal_records(a, b) -> bool:
    return list(a) == list(b) and all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name]))


@pytest.fixture
def model():
    model = retrofitted()
    separate_streams(model)
    return model


@pytest.fixture
def checkpoints(tmp_path, model):
    """A converted checkpoint without tokenizer, and the same before its streams were separated."""
    model.save_pretrained(tmp_path / "after")
    retrofitted().save_pretrained(tmp_path / "before")
    return tmp_path / "after", tmp_path / "before"


def test_recording_given_tokens_is_running_the_model_inside(model):
    ids = token_ids(model.config)
    with record_mappings(model) as expected, torch.no_grad():
        model(ids)
    with record_mappings(model, ids) as records:
        assert equal_records(records, expected)
    with record_mappings(model, ids, max_tokens=5) as records:
        assert {r.h_res.shape for r in records.values()} == {(1, 5, N, N)}


def test_recording_what_generate_does(model):
    prompt = token_ids(model.config, batch=1, length=6)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    plain = model.generate(prompt, **options)
    with record_mappings(model, append=True) as records:
        tokens = model.generate(prompt, **options)
    assert torch.equal(tokens, plain)
    # The last token is not run any more.
    with record_mappings(model, tokens[:, :-1]) as expected:
        pass
    for name in expected:
        for part, whole in zip(records[name], expected[name]):
            # With a cache attention sums in another order: 3 layers of sums of 10 terms, at streams below 10.
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)
    with record_mappings(model, append=True, max_tokens=8) as records:
        model.generate(prompt, **options)
    assert {r.h_res.shape[1] for r in records.values()} == {8}
    with record_mappings(model) as records:
        model.generate(prompt, **options)
    assert {r.h_res.shape[1] for r in records.values()} == {1}


@pytest.mark.parametrize("variant", ["hc", "kromhc"])
def test_records_of_static_mappings_are_not_the_parameters(variant):
    model = retrofitted(variant=variant, dynamic=False)
    with record_mappings(model, token_ids(model.config)) as records:
        before = {name: BranchRecord(*(part.clone() for part in record)) for name, record in records.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert equal_records(records, before)
    assert not any(part.requires_grad for record in records.values() for part in record)


def test_joining_forwards_refuses_gradients(model):
    refused = pytest.raises(ValueError, match="without gradients; got a forward that records them")
    with refused, record_mappings(model, append=True):
        model(token_ids(model.config))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recording_with_gradient_checkpointing(model, reentrant):
    ids = token_ids(model.config)
    with record_mappings(model, ids) as expected:
        pass

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    plain = gradients()
    with record_mappings(model) as records:
        recorded = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded))
    assert equal_records(records, expected)


def test_recording_a_compiled_model(model):
    ids = token_ids(model.config)
    with record_mappings(model, ids) as expected:
        pass
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(ids).logits
        with record_mappings(compiled, ids) as records:
            assert equal_records(records, expected)
        # The compiled graph is in use again, not an eager fallback and not a new one.
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(compiled(ids).logits, before)


def test_an_inspection_by_hand():
    # U is the uniform matrix, P the swap: I, P, U with products I, P, UP = U, and from the end UPI = U, UP = U, U.
    numbers = handmade(IDENTITY, SWAP, UNIFORM).to_dict()
    attention, feed_forward, second = numbers["branches"].values()
    assert list(numbers["branches"]) == ["layers.0.attn_hc", "layers.0.ffn_hc", "layers.1.attn_hc"]
    assert [b["off_identity_mass"] for b in numbers["branches"].values()] == [0, 0.5, 0.75]
    assert [b["h_res"] for b in numbers["branches"].values()] == [m.tolist() for m in (IDENTITY, SWAP, UNIFORM)]
    assert attention["forward_product"] == IDENTITY.tolist()
    assert feed_forward["forward_product"] == SWAP.tolist()
    assert second["forward_product"] == UNIFORM.tolist()
    assert {str(b["backward_product"]) for b in numbers["branches"].values()} == {str(UNIFORM.tolist())}
    for branch in numbers["branches"].values():
        assert branch["doubly_stochastic_error"] == branch["forward_product_error"] == 0
        assert branch["forward_gain"] == branch["backward_gain"] == 1
        assert branch["effective_num_streams"] == pytest.approx(N, rel=1e-6)
        assert branch["h_pre"] == branch["h_post"] == [1.0] * N
        assert branch["token_variation"] == {key: [0.0] * 5 for key in ("h_pre", "h_post", "h_res")}
    assert numbers["total"]["off_identity_mass"] == pytest.approx(1.25 / 3)
    assert json.loads(json.dumps(numbers)) == numbers


def test_orientation_and_gain_of_products_by_hand():
    # Stream 0 receives everything: row sums (4, 0, 0, 0). It comes first, so copying stream 0 to all follows.
    gather, copy = torch.zeros(N, N), torch.zeros(N, N)
    gather[0], copy[:, 0] = 1, 1
    first, second = handmade(gather, copy).to_dict()["branches"].values()
    assert second["forward_product"] == [[1.0] * N] * N
    assert (first["forward_gain"], second["forward_gain"]) == (4, 4)
    assert (first["backward_gain"], second["backward_gain"]) == (4, 4)
    reverse, _ = handmade(copy, gather).to_dict()["branches"].values()
    assert reverse["backward_product"] == [[4.0, 0, 0, 0], [0.0] * N, [0.0] * N, [0.0] * N]


def test_variation_over_tokens_by_hand():
    h_pre = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]])
    assert token_variation(h_pre).tolist() == [0.5, 0.5, 0, 0]
    # The mean of many equal numbers is not that number in floating point; a static mapping must not look dynamic.
    assert not token_variation(torch.full((1, 100, 3, 3), 0.1)).any()


def test_compared_variants():
    errors = compared_sum_errors(4, 12)
    assert set(errors) == {"kromhc", "identity", "mhc", "mhc_lite", "tbp", "hc"}
    assert all(len(values) == 12 for values in errors.values())
    assert set(errors["identity"]) == {0.0}
    # Each product rounds n sums of n terms: 12 * 2 n eps for those that are doubly stochastic by construction.
    assert max(max(errors[v]) for v in ("kromhc", "mhc_lite", "tbp")) < 12 * 8 * torch.finfo(torch.float32).eps
    assert errors["mhc"][-1] > 1e-2
    assert errors["hc"][-1] > errors["mhc"][-1]
    assert set(compared_sum_errors(8, 2)) == {"kromhc", "identity", "mhc", "tbp", "hc"}


def test_inspecting_a_model_gives_what_was_recorded(model):
    ids = token_ids(model.config, batch=1)
    with record_mappings(model, ids) as records:
        pass
    inspection = inspect_model(model, ids)
    assert inspection.statistics == stream_statistics(records)
    assert inspection.tokens == tuple(map(str, ids[0].tolist()))
    for name, branch in inspection.to_dict()["branches"].items():
        assert branch["h_res"] == records[name].h_res.double().mean((0, 1)).tolist()
        assert branch["h_pre"] == records[name].h_pre.double().mean((0, 1)).tolist()
        assert max(branch["token_variation"]["h_res"]) > 0
    added = sum(p.numel() for name, p in model.named_parameters() if "_hc." in name)
    assert inspection.added_parameters == added
    with pytest.raises(ValueError, match=r"one sequence, \[1, S\]; got \(2, 12\)"):
        inspect_model(model, token_ids(model.config))


def test_gates_are_not_in_the_read_weights_and_it_says_so():
    model = apply_hyper_connections(make_model(configurations("llama")[0]), num_streams=2, read="gated")
    rows = dict(total_rows(inspect_model(model, token_ids(model.config, batch=1))))
    assert "the gates of every channel" in rows["as shown here"]
    assert "added parameters" in rows


def test_checkpoints_are_called_by_their_names(tmp_path, monkeypatch):
    a, b = tmp_path / "a" / "final", tmp_path / "b" / "final"
    for folder in (a, b):
        folder.mkdir(parents=True)
    assert checkpoint_names([f"{a}/"]) == ["final"]
    assert checkpoint_names([str(a), str(b)]) == ["a/final", "b/final"]
    assert checkpoint_names([str(a), str(a)]) == ["final", "final"]
    assert checkpoint_names(["organisation/model", str(b)]) == ["organisation/model", "final"]
    monkeypatch.chdir(a)
    assert checkpoint_names(["."]) == ["final"]


def test_inspecting_checkpoints(checkpoints, model):
    after, before = inspect_checkpoints([str(path) for path in checkpoints], max_tokens=9)
    assert (after.name, before.name) == ("after", "before")
    assert after.tokens == before.tokens
    assert len(after.tokens) == 9
    ids = torch.tensor([[int(token) for token in after.tokens]])
    assert after.statistics == inspect_model(model, ids).statistics
    assert before.total["stream_spread"] == 0 < after.total["stream_spread"]


def test_the_command_shows_a_table(kromhc, checkpoints):
    code, out, err = kromhc("inspect", checkpoints[0], "--max-tokens", 9)
    assert code == 0
    (inspection,) = inspect_checkpoints([str(checkpoints[0])], max_tokens=9)
    lines = [line.split() for line in out.splitlines()]
    for i, name in enumerate(inspection.records):
        mass = inspection.statistics[f"{name}/off_identity_mass"]
        (row,) = [line for line in lines if line[:2] == [str(i // 2), ("attn", "ffn")[i % 2]]]
        assert row[2:6] == [f"{weight:.2f}" for weight in inspection.to_dict()["branches"][name]["h_pre"]]
        assert row[10] == f"{mass:.2%}"
    assert f"{inspection.total['effective_num_streams']:.3f} of 4" in out
    assert f"{inspection.added_parameters:,}" in out
    assert "composite gain, forward" in out
    # Progress goes to the other stream.
    assert "running" in err
    assert "2/2" in err


def test_the_command_as_json(kromhc, checkpoints):
    after, before = checkpoints
    code, out, _ = kromhc("inspect", after, "--before", before, "--json", "--max-tokens", 9)
    inspections = inspect_checkpoints([str(after), str(before)], max_tokens=9)
    assert code == 0
    assert json.loads(out) == dict(zip(("model", "before"), (i.to_dict() for i in inspections)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{base}"], "base has model_type 'llama'. Convert it first: kromhc convert"),
        (["{after}", "--before", "{base}"], "a model with hyper-connections is needed here"),
        (["{tmp}/nothing"], "nothing"),
        (["{after}", "--text", "{tmp}/no.txt"], "No such file"),
        (["{after}", "--text", "{tmp}/empty.txt"], "empty.txt is empty. Leave it out for a short story"),
        (["{after}", "--text", "{tmp}/text.txt"], "text needs a tokenizer"),
        (["{after}", "--max-tokens", "0"], "Invalid value for '--max-tokens'"),
        (["{after}", "--before", "{shallow}"], "must have the same branches; got 6 (layers.0.attn_hc, ...) and 4"),
        (["{after}", "--before", "{letters}"], "must have one vocabulary; got sizes 99, 50"),
        (["{single}"], "at least 2 streams to look at; got 1"),
    ],
    ids=[
        "base", "base-before", "missing", "no-text", "empty-text", "no-tokenizer", "no-token", "depth", "letters", "n1"
    ],
)  # fmt: skip
def test_bad_input_exits_with_2(kromhc, checkpoints, tmp_path, arguments, message):
    after, _ = checkpoints
    config = configurations("llama")[0]
    make_model(config).save_pretrained(tmp_path / "base")
    retrofitted(num_streams=1).save_pretrained(tmp_path / "single")
    for name, change in (("shallow", {"num_hidden_layers": 2}), ("letters", {"vocab_size": 50})):
        other = make_model(type(config)(**{**config.to_dict(), **change}))
        apply_hyper_connections(other).save_pretrained(tmp_path / name)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "text.txt").write_text("Once")
    places = {name: tmp_path / name for name in ("base", "single", "shallow", "letters")}
    code, out, err = kromhc("inspect", *(a.format(tmp=tmp_path, after=after, **places) for a in arguments))
    assert code == 2
    assert out == ""
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_pictures_need_matplotlib(kromhc, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("kromhc_hf.inspection.plots.find_spec", lambda name: None)
    code, _, err = kromhc("inspect", checkpoints[0], "--output", tmp_path / "out")
    assert code == 2
    assert 'pip install "kromhc-hf[plots]"' in err
    assert not (tmp_path / "out").exists()
    assert kromhc("inspect", checkpoints[0])[0] == 0


def test_a_record_by_hand_has_the_shapes_of_a_real_one(model):
    with record_mappings(model, token_ids(model.config, batch=1, length=5)) as records:
        real = records["layers.0.attn_hc"]
    assert [part.dim() for part in record(IDENTITY)] == [part.dim() for part in real]
