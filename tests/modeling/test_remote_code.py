"""Converted folders where kromhc_hf is not installed, and what a configuration may name where it is."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from support.remote import visit_without_kromhc
from support.tiny import configurations, make_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.dynamic_module_utils import get_relative_imports

from kromhc_hf import KromHCConfig, apply_hyper_connections, convert_checkpoint, remove_hyper_connections
from kromhc_hf.demo import MODEL as DEMO_MODEL
from kromhc_hf.modeling.modeling_kromhc import FACES
from kromhc_hf.modeling.remote_code import AUTO_CLASSES, MARKER, code_files


# A single file, a weight conversion, and a family whose class names do not say CausalLM.
FAMILIES = {"llama": "Llama{}", "mixtral": "Mixtral{}", "gpt2": "GPT2{}"}


def test_the_file_that_auto_map_names_names_all_others():
    """Early releases take along, from a folder, what it names and not what those import in turn."""
    (modeling,) = [path for path in code_files() if path.name == "modeling_kromhc.py"]
    others = {path.stem for path in code_files()} - {modeling.stem}
    assert {name.removesuffix(".py") for name in get_relative_imports(modeling)} == others


@pytest.fixture(scope="module")
def visits(tmp_path_factory):
    """Every converted folder and what a session without the package reports of it, by family."""
    home = tmp_path_factory.mktemp("remote")
    folders = {family: home / family for family in (*FAMILIES, "real")}
    for family in FAMILIES:
        make_model(configurations(family)[0]).save_pretrained(home / "base" / family)
        convert_checkpoint(home / "base" / family, folders[family], layers="1:2" if family == "gpt2" else None)
    convert_checkpoint(DEMO_MODEL, folders["real"])
    reports = visit_without_kromhc(home, {str(folder): home / "again" / family for family, folder in folders.items()})
    return {family: (folder, reports[str(folder)], home / "again" / family) for family, folder in folders.items()}


def greedy(model) -> list[int]:
    tokens = torch.tensor([[1, 5, 9, 3]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0].tolist()


@pytest.mark.parametrize("family", [*FAMILIES, "real"])
def test_loads_generates_saves_and_loads_again(visits, family):
    folder, report, again = visits[family]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not report["installed"]
    assert report["loading"] == []
    assert report["class"] == [type(model).__name__, "transformers_modules"]
    assert report["greedy"] == greedy(model)
    assert report["changed"]
    assert report["reloaded_equal"]
    assert report["third_equal"]
    assert report["from_config"] == type(model).__name__
    # What was trained there loads here, with the installed classes.
    loaded, info = AutoModelForCausalLM.from_pretrained(again, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded).__module__ == "kromhc_hf.modeling.modeling_kromhc"
    assert {path.name for path in code_files()} <= {path.name for path in again.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_tasks(visits, family):
    _, report, _ = visits[family]
    name = "KromHC" + FAMILIES[family]
    assert report["classifier"] == [name.format("ForSequenceClassification"), [1, 2]]
    assert report["base"] == name.format("Model")


def test_tokenizer(visits):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    assert visits["real"][1]["tokens"] == tokenizer("Once upon a time")["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_refused_without_trust_before_and_after(visits, family):
    _, report, _ = visits[family]
    for moment in ("refused_before", "refused_after"):
        assert "contains custom code which must be executed" in report[moment]
        assert "pass the argument `trust_remote_code=True`" in report[moment]
    assert report["registered"] == []


def test_the_installed_package_goes_first(visits):
    folder, _, _ = visits["llama"]
    for options in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert type(model).__module__ == "kromhc_hf.modeling.modeling_kromhc"
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(classifier).__name__ == "KromHCLlamaForSequenceClassification"


def test_the_code_files_are_those_of_the_package(visits):
    folder, _, _ = visits["llama"]
    files = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    assert files == {path.name: path.read_bytes() for path in code_files()}
    assert "modeling_kromhc.py" in files
    assert files.keys().isdisjoint({"registration.py", "conversion.py", "cli.py", "hub.py"})


def test_a_model_without_hyper_connections_names_no_code(tmp_path):
    model = apply_hyper_connections(make_model(configurations("llama")[0]))
    model.save_pretrained(tmp_path / "with")
    remove_hyper_connections(model).save_pretrained(tmp_path / "without")
    assert "auto_map" in json.loads((tmp_path / "with/config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "without/config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    remove_hyper_connections(loaded).save_pretrained(tmp_path / "plain")
    plain = json.loads((tmp_path / "plain/config.json").read_text())
    assert plain.keys().isdisjoint({"auto_map", "transformers_weights", "hc_conversion"})


OTHERS_CODE = [
    ("auto_map", {"AutoConfig": "evil/repo--modeling.KromHCLlamaConfig"}),
    ("auto_map", {"AutoConfig": "modeling_kromhc.KromHCLlamaConfig", "AutoModelForCausalLM": "evil.Model"}),
    ("auto_map", {"AutoTokenizer": [None, "tokenization.Evil"]}),
    ("custom_pipelines", {"text-generation": {"impl": "evil.Pipeline", "type": "text"}}),
    ("attn_implementation", "evil/kernel"),
    ("_attn_implementation", {"": "sdpa", "text_config": "evil/kernel@main"}),
    ("experts_implementation", "evil/kernel:function"),
    ("transformers_weights", "../elsewhere/model.safetensors"),
    ("transformers_weights", "weights.bin"),
]


@pytest.mark.parametrize(("field", "value"), OTHERS_CODE, ids=[f"{f}-{v!s:.40}" for f, v in OTHERS_CODE])
def test_a_converted_configuration_names_no_other_code(visits, tmp_path, field, value):
    folder, _, _ = visits["llama"]
    content = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, field: value}))
    for load in (AutoConfig.from_pretrained, KromHCConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=rf"{field}.* must name"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("auto_map", {"AutoConfig": "evil/repo--configuration.Config"}),
        ("auto_map", {"AutoModelForCausalLM": "../up.Model"}),
        ("text_config", {"auto_map": {"AutoConfig": "evil/repo--configuration.Config"}}),
        ("attn_implementation", "evil/kernel"),
        ("_attn_implementation", "evil/kernel"),
        ("custom_pipelines", {"poetry": {"impl": "evil/repo--pipeline.Pipeline"}}),
    ],
    ids=["other-repository", "path", "nested", "attention-kernel", "private-attention-kernel", "pipeline"],
)
def test_a_base_configuration_names_no_code_of_others(tmp_path, field, value):
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base")
    content = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(ValueError, match=r"config.json must (not )?name .*(evil|up\.Model).*Remove the field"):
        convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_custom_pipelines_of_the_base_stay_behind(tmp_path):
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base")
    content = json.loads((tmp_path / "base/config.json").read_text())
    own = {"custom_pipelines": {"poetry": {"impl": "poetry.Pipeline"}}, "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "base/config.json").write_text(json.dumps({**content, **own}))
    convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert "custom_pipelines" not in json.loads((tmp_path / "out/config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_tokenizer_with_code_of_its_own(tmp_path):
    convert_from = tmp_path / "base"
    convert_from.mkdir()
    for path in DEMO_MODEL.iterdir():
        (convert_from / path.name).write_bytes(path.read_bytes())
    settings = json.loads((convert_from / "tokenizer_config.json").read_text())
    named = {**settings, "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (convert_from / "tokenizer_config.json").write_text(json.dumps(named))
    convert_checkpoint(convert_from, tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == settings
    (convert_from / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="must have a tokenizer that needs no code of its own"):
        convert_checkpoint(convert_from, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_importing_the_modeling_file_registers_nothing(tmp_path):
    """A copy of the files as a package of another name."""
    package = tmp_path / "copy"
    package.mkdir()
    (package / "__init__.py").touch()
    for path in code_files():
        (package / path.name).write_bytes(path.read_bytes())
    script = (
        "import copy.modeling_kromhc, transformers.models.auto as a; from transformers.models.auto import *;"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING;"
        "copy.modeling_kromhc.KromHCLlamaForCausalLM; print([n for n in CONFIG_MAPPING if 'kromhc' in n],"
        " a.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content)"
    ).replace("copy", "kromhc_copy")
    package.rename(tmp_path / "kromhc_copy")
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[] {}"


def test_every_face_has_its_auto_class_in_the_map():
    assert {face.auto_class for face in FACES} == set(AUTO_CLASSES)


def test_every_travelling_file_bears_the_marker():
    assert len(code_files()) > 20
    for path in code_files():
        assert path.read_text(encoding="utf-8").splitlines()[0] == MARKER, path.name


@pytest.mark.parametrize("name", ["mixing.py", "modeling_kromhc.py"])
@pytest.mark.parametrize("what", [KromHCConfig, AutoModelForCausalLM], ids=["configuration", "model"])
def test_files_of_the_user_are_never_replaced(tmp_path, name, what):
    model = apply_hyper_connections(make_model(configurations("llama")[0]))
    saved = model if what is AutoModelForCausalLM else model.config
    (tmp_path / name).write_text("# a week of my work\n")
    with pytest.warns(UserWarning, match=rf"{name}.* kept and the code files are left out") as caught:
        saved.save_pretrained(tmp_path)
    assert len([warning for warning in caught if issubclass(warning.category, UserWarning)]) == 1
    assert (tmp_path / name).read_text() == "# a week of my work\n"
    assert [path.name for path in tmp_path.glob("*.py")] == [name]
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    what.from_pretrained(tmp_path)
    # Elsewhere, and here once the file is gone, the code comes along again.
    (tmp_path / name).unlink()
    for folder in (tmp_path / "elsewhere", tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            saved.save_pretrained(folder)
        assert {path.name for path in folder.glob("*.py")} == {path.name for path in code_files()}
        assert "auto_map" in json.loads((folder / "config.json").read_text())


def test_a_link_or_folder_of_the_user_is_not_written_through(tmp_path):
    model = apply_hyper_connections(make_model(configurations("llama")[0]))
    (tmp_path / "options").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/families.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "out/variants.py").mkdir()
    with pytest.warns(UserWarning, match=r"\(families.py, variants.py\)"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "nowhere.py").exists()
