"""Bases whose code is not in transformers: registered, converted, loaded elsewhere, trained, saved and undone."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.outside import AMBER, BASES, OUTSIDE, make_outside
from support.remote import visit_without_kromhc
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

import kromhc_hf
from kromhc_hf import (
    apply_hyper_connections,
    convert_checkpoint,
    freeze_backbone,
    has_hyper_connections,
    optimizer_param_groups,
    register_family,
    remove_hyper_connections,
    unregister_family,
    verify_conversion,
)
from kromhc_hf.cli import app
from kromhc_hf.modeling.outside_families import BOUND
from kromhc_hf.rows import ByConfig


TOKENS = torch.tensor([[1, 5, 9, 3, 7, 2]])


@pytest.fixture(autouse=True)
def rows(nothing_registered):
    """Both rows, and nothing left behind."""
    for name, base in OUTSIDE.items():
        register_family(name, base.row, layer_class=base.layer_class)


def greedy(model) -> list[int]:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)[0].tolist()


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_live_model_takes_and_gives_up_hyper_connections(name):
    model = make_outside(name)
    before, expected, continuation = copy.deepcopy(model.state_dict()), model(TOKENS).logits, greedy(model)
    cls = type(model)
    apply_hyper_connections(model)
    assert has_hyper_connections(model)
    assert torch.equal(model(TOKENS).logits, expected)
    assert greedy(model) == continuation
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert torch.equal(model(TOKENS, attention_mask=mask).logits, make_outside(name)(TOKENS, mask).logits)
    remove_hyper_connections(model)
    assert type(model) is cls
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize("name", OUTSIDE)
def test_separated_streams_give_the_same_with_and_without_a_cache(name):
    model = apply_hyper_connections(make_outside(name), init="paper")
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "_hc." in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert (model(TOKENS).logits - make_outside(name)(TOKENS).logits).abs().max() > 1e-2
    sequence = TOKENS
    for _ in range(8):
        sequence = torch.cat([sequence, model(sequence, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert greedy(model) == sequence[0].tolist()


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_converted_repository_computes_the_same_and_is_trained_and_undone(name, repositories, tmp_path):
    base, converted = repositories[name], tmp_path / f"{name}_converted"
    report = convert_checkpoint(base, converted, trust_remote_code=True, verify=True)
    assert report.bitwise_equal
    assert report.greedy_base == report.greedy_converted
    for file in (BASES / name).glob("*_*.py"):
        assert (converted / file.name).read_bytes() == file.read_bytes()
    # The folder brings its row along.
    unregister_family(name)
    assert verify_conversion(base, converted, trust_remote_code=True).lossless
    assert verify_conversion(base, converted, layers="all", trust_remote_code=True).lossless

    model = AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True)
    assert has_hyper_connections(model)
    assert isinstance(model, kromhc_hf.KromHCForCausalLM)
    by_face = kromhc_hf.KromHCForCausalLM.from_pretrained(converted, trust_remote_code=True)
    assert torch.equal(by_face(TOKENS).logits, model(TOKENS).logits)
    (inspected,) = kromhc_hf.inspect_checkpoints([str(converted)], trust_remote_code=True)
    assert inspected.model_type == f"kromhc_{name}"
    expected = model(TOKENS).logits
    freeze_backbone(model)
    optimizer = torch.optim.AdamW(optimizer_param_groups(model, lr=1e-2))
    first = loss = model(TOKENS, labels=TOKENS).loss
    for _ in range(5):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = model(TOKENS, labels=TOKENS).loss
    assert loss < first
    model.save_pretrained(tmp_path / "trained")
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "trained", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert type(AutoModel.from_pretrained(converted, trust_remote_code=True)).__name__.startswith("KromHC")

    remove_hyper_connections(again).save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", trust_remote_code=True)
    assert type(plain).__name__ == OUTSIDE[name].model_class
    assert torch.equal(plain(TOKENS).logits, expected)


def test_loads_where_neither_package_is_installed(repositories, tmp_path):
    """Also what was saved there, which then loads here."""
    folders = {name: tmp_path / f"{name}_away" for name in OUTSIDE}
    for name, folder in folders.items():
        convert_checkpoint(repositories[name], folder, trust_remote_code=True)
    again = {name: tmp_path / f"{name}_again" for name in OUTSIDE}
    reports = visit_without_kromhc(tmp_path, {str(folder): again[name] for name, folder in folders.items()})
    for name, folder in folders.items():
        report = reports[str(folder)]
        assert not report["installed"]
        assert report["loading"] == []
        assert report["class"] == [f"KromHC{OUTSIDE[name].model_class}", "transformers_modules"]
        assert report["changed"]
        assert report["reloaded_equal"]
        assert report["third_equal"]
        assert "trust_remote_code=True" in report["refused_before"]
        assert "trust_remote_code=True" in report["refused_after"]
        model = AutoModelForCausalLM.from_pretrained(again[name], trust_remote_code=True)
        assert has_hyper_connections(model)
        base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokens = torch.tensor([[1, 5, 9, 3]])
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert report["greedy"] == base.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0].tolist()


def test_a_package_that_registers_itself_needs_no_trust(tmp_path):
    """As a lab's own: its classes are known to the Auto classes, and saved models to whoever imports it."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from support.bases.amber.configuration_amber import AmberConfig
from support.bases.amber.modeling_amber import AmberForCausalLM, AmberModel
from support.outside import AMBER, make_outside
AutoConfig.register("amber", AmberConfig)
AutoModel.register(AmberConfig, AmberModel)
AutoModelForCausalLM.register(AmberConfig, AmberForCausalLM)
import kromhc_hf
if sys.argv[1] != "elsewhere":
    kromhc_hf.register_family("amber", AMBER)
folder, tokens = {str(tmp_path)!r}, torch.tensor([[1, 5, 9]])
if sys.argv[1] == "save":
    make_outside("amber").save_pretrained(folder + "/base")
    report = kromhc_hf.convert_checkpoint(folder + "/base", folder + "/converted", verify=True)
    assert report.bitwise_equal
else:
    elsewhere = {{"trust_remote_code": True}} if sys.argv[1] == "elsewhere" else {{}}
    model = AutoModelForCausalLM.from_pretrained(folder + "/converted", **elsewhere)
    assert kromhc_hf.has_hyper_connections(model) and type(model).__module__.startswith("kromhc_hf.")
    kromhc_hf.remove_hyper_connections(model)
    assert type(model).__name__ == "AmberForCausalLM"
    assert elsewhere or type(model) is AmberForCausalLM
print("done")
"""
    for moment in ("save", "load", "elsewhere"):
        result = subprocess.run([sys.executable, "-c", script, moment], capture_output=True, text=True)
        assert result.stdout.split() == ["done"], result.stderr


def test_code_is_run_only_where_it_is_trusted(repositories, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    with pytest.raises(ValueError, match=r"not in transformers but in .*\(--trust-remote-code\)"):
        convert_checkpoint(repositories["amber"], tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    convert_checkpoint(repositories["amber"], tmp_path / "converted", trust_remote_code=True)
    with pytest.raises(ValueError, match="must be trusted"):
        verify_conversion(repositories["amber"], tmp_path / "converted")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "converted", trust_remote_code=False)


def test_a_repository_whose_row_nobody_wrote_is_refused(repositories, tmp_path):
    unregister_family("amber")
    with pytest.raises(ValueError, match="'amber'. .* say what its layers look like with register_family"):
        convert_checkpoint(repositories["amber"], tmp_path / "converted", trust_remote_code=True)


def test_a_row_that_depends_on_the_configuration_is_written_down_as_it_is(tmp_path):
    register_family("amber", ByConfig(lambda config: AMBER, (AMBER,)))
    model = apply_hyper_connections(make_outside("amber"))
    model.save_pretrained(tmp_path)
    unregister_family("amber")
    BOUND.clear()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_file_of_the_base_by_the_name_of_one_of_ours_leaves_the_code_out(tmp_path):
    model = apply_hyper_connections(make_outside("amber"))
    (tmp_path / "modeling_amber.py").write_text("# somebody else's\n")
    with pytest.warns(UserWarning, match=r"modeling_amber\.py bear names that are taken"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_amber.py").read_text() == "# somebody else's\n"
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_the_command_takes_a_file_with_the_row(repositories, tmp_path):
    unregister_family("amber")
    family = tmp_path / "family.py"
    family.write_text(
        "from kromhc_hf import register_family\n"
        "from kromhc_hf.rows import Sublayer, sequential\n"
        "row = sequential(Sublayer('attention', 'first_norm'), Sublayer('feed_forward', 'second_norm'))\n"
        "register_family('amber', row)\n"
    )
    base, folder = str(repositories["amber"]), str(tmp_path / "converted")
    run = CliRunner().invoke
    arguments = ["convert", base, folder, "--family", str(family), "--json"]
    refused = run(app, arguments)
    assert refused.exit_code == 2
    assert "--trust-remote-code" in refused.stderr
    result = run(app, [*arguments, "--trust-remote-code"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["bitwise_equal"]
    assert run(app, ["verify", base, folder, "--trust-remote-code"]).exit_code == 0
    family.write_text("")
    refused = run(app, [*arguments[:-1]])
    assert "must register a row" in refused.stderr
    refused = run(app, ["convert", base, folder, "--family", "nowhere.py"])
    assert "does not exist" in refused.stderr


def test_a_configuration_is_made_by_the_code_that_its_family_has(repositories, tmp_path):
    """What a file leaves out has its default, and what has to be set first is."""
    convert_checkpoint(repositories["cinder"], tmp_path / "converted", trust_remote_code=True)
    path = tmp_path / "converted/config.json"
    content = json.loads(path.read_text())
    del content["max_position_embeddings"]
    path.write_text(json.dumps({**content, "attn": [1, 7]}))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", trust_remote_code=True).config
    assert config.attn == [1]
    assert config.max_position_embeddings == 64
    assert config.hc_num_streams == 4
