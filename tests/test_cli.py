"""The command line: results on stdout, messages on stderr, exit codes 0, 1 and 2, never a traceback.

It is longer than other files because it goes through all commands.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import configurations, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from kromhc_hf import composite_model_types, supported_model_types, verify_conversion
from kromhc_hf.modeling.options import StreamOptions


@pytest.fixture
def base(tmp_path):
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_convert_then_verify(kromhc, base, tmp_path):
    code, out, _ = kromhc("convert", base, tmp_path / "out", "-n", 3)
    assert code == 0
    assert "kromhc, 3 streams, init identity" in out
    assert "bitwise equal" in out
    code, out, _ = kromhc("verify", base, tmp_path / "out", "--json", "--max-tokens", 20, "--dtype", "bfloat16")
    report = json.loads(out)
    assert code == 0
    assert (report["lossless"], report["passed"], report["tokens"], report["dtype"]) == (True, True, 20, "bfloat16")


def test_compare_trains_every_arm_and_goes_on_where_it_was(kromhc, tmp_path):
    demo_data = Path(__file__).parents[1] / "kromhc_hf" / "demo_data"
    model, text = demo_data / "gpt2-tinystories-1M", demo_data / "tinyshakespeare.txt"
    given = [model, text, "--output", tmp_path / "out", "--steps", 2, "--seeds", 1, "--length", 16, "--batch", 1]
    given += ["--workers", 1, "--variants", "kromhc"]
    code, out, err = kromhc("compare", *given)
    assert code == 0
    assert "4 arms, 1 seed, 2 steps: about a minute" in err
    assert "measuring kromhc" in err
    assert all(f"| {name} | 2 |" in out for name in ("no streams", "learned branch scales", "identity", "kromhc"))
    code, out, err = kromhc("compare", *given, "--json")
    assert (code, json.loads(out)["reference"]) == (0, "no streams")
    assert "measuring kromhc" not in err
    for wrong, message in (("lr", "lr must be"), ("variants", "variant must be one of")):
        code, out, err = kromhc("compare", *given, f"--{wrong}", "many")
        assert (code, out) == (2, "")
        assert message in err
    code, _, err = kromhc("compare", *given, "--output", tmp_path / "other", "--held-out-windows", 10**6)
    assert code == 2
    assert "Use fewer or shorter ones" in err
    assert not (tmp_path / "other").exists()


def test_convert_without_verification_as_json(kromhc, base, tmp_path):
    code, out, _ = kromhc(
        "convert", base, tmp_path / "out", "--no-verify", "--json", "--variant", "identity", "--static"
    )
    report = json.loads(out)
    assert code == 0
    assert (report["variant"], report["lossless"], report["passed"]) == ("identity", None, True)
    assert report["added_parameters"] == 6 * 8  # two biases of n in each of six branches


def test_every_option_of_hyper_connections_can_be_given(kromhc, base, tmp_path):
    given = ["-n", 2, "--variant", "mhc", "--init", "paper", "--readout", "attention", "--static", "--eps", "1e-3"]
    given += ["--sinkhorn-iterations", 3, "--stream-embedding"]
    code, _, _ = kromhc("convert", base, tmp_path / "out", "--no-verify", *given)
    assert code == 0
    options = AutoConfig.from_pretrained(tmp_path / "out").stream_options()
    assert options == StreamOptions(
        num_streams=2,
        variant="mhc",
        init="paper",
        readout="attention",
        dynamic=False,
        eps=1e-3,
        sinkhorn_iterations=3,
        stream_embedding=True,
    )


def test_a_broken_promise_exits_with_1(kromhc, base, tmp_path):
    kromhc("convert", base, tmp_path / "out", "--no-verify")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.model.layers[0].attn_hc.bias[4] += 1
    model.save_pretrained(tmp_path / "changed")
    code, out, err = kromhc("verify", base, tmp_path / "changed")
    assert code == 1
    assert "NO" in out
    assert "promises an unchanged function, but the outputs differ" in err


def test_verify_layer_by_layer(kromhc, base, tmp_path):
    kromhc("convert", base, tmp_path / "out", "--no-verify", "--link", "symlink")
    code, out, _ = kromhc("verify", base, tmp_path / "out", "--layerwise", "all")
    assert code == 0
    assert "3 layers: all equal" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.model.layers[1].attn_hc.bias[4] += 1
    model.save_pretrained(tmp_path / "changed")
    code, out, err = kromhc("verify", base, tmp_path / "changed", "--layers", "0:2")
    assert code == 1
    assert "2 layers: layer 1 is the first that differs" in out
    assert "promises an unchanged function" in err


def test_an_init_without_promise_exits_with_0(kromhc, base, tmp_path):
    code, out, _ = kromhc("convert", base, tmp_path / "out", "--init", "paper", "--readout", "sum")
    assert code == 0
    assert "NO" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "{base}", "{tmp}/out", "-n", "0"], "num_streams must be at least 1; got 0."),
        (["convert", "{base}", "{tmp}/out", "-n", "-1"], "num_streams must be at least 1; got -1."),
        (["convert", "{base}", "{tmp}/out", "-n", "7"], "got 7. Use num_streams=8."),
        (["convert", "{base}", "{tmp}/out", "-n", "four"], "Invalid value for '--num-streams'"),
        (["convert", "{base}", "{tmp}/out", "--variant", "x"], "variant must be one of kromhc"),
        (["convert", "{base}", "{tmp}/out", "--init", "x"], "init must be one of identity, paper; got 'x'."),
        (["convert", "{base}", "{base}"], "is not empty. Choose another destination"),
        (["convert", "{tmp}/nothing", "{tmp}/out"], "source must be an existing folder or a Hub id"),
        (["convert", "{base}", "{tmp}/out", "--link", "move"], "link must be one of copy, hardlink, symlink"),
        (["convert", "{base}", "{tmp}/out", "--base-model", "no id"], "base_model must be a Hub id"),
        (["convert", "{base}", "{tmp}/out", "--private"], "--private would have no effect without an upload"),
        (["convert", "{base}", "{tmp}/out", "--revision", "v2"], "revision must be of a Hub repository; got 'v2'"),
        (["convert", "{base}", "{tmp}/out", "--sinkhorn-iterations", "5"], "variant 'kromhc' does not iterate"),
        (
            ["convert", "{base}", "{tmp}/out", "--init", "paper", "--readout", "sum", "--residual-logit", "2"],
            "--residual",
        ),
        (["convert", "{base}", "{tmp}/out", "--static", "--eps", "1"], "--eps would have no effect: static mappings"),
        (["convert", "{base}", "{tmp}/out", "--to-adapter", "{base}"], "No such option: --to-adapter"),
        (["convert", "{base}", "{tmp}/out", "--layers", "1:9"], "at least one of the 3 decoder layers"),
        (["convert", "{base}", "{tmp}/out", "--layers", "1:9"], "Use for example layers='2:3'"),
        (["inspect", "{base}", "--output", "{base}/config.json"], "is a file"),
        (["convert", "{base}", "{tmp}/out", "--layers", "1"], "layers must be None for all decoder layers, or a range"),
        (["convert", "{base}", "{tmp}/out", "-n", "1", "--layers", "1:2"], "--layers would have no effect"),
        (["push", "{base}", "ada/model"], "must hold a checkpoint with hyper-connections"),
        (["verify", "{base}", "{base}", "--layers", "2"], "layers must be all, or first:stop"),
        (["verify", "{base}", "{base}", "--layers", "2:9"], "layers must be 'all' or positions from 0 to 2"),
        (["verify", "{base}", "{base}"], "must have hyper-connections; got model_type 'llama'"),
        (["verify", "{base}", "{tmp}/nothing"], "nothing"),
        (["verify", "{base}", "{base}", "--dtype", "int8"], "dtype must be auto, float32, bfloat16 or float16"),
        (["verify", "{base}", "{base}", "--text", "{tmp}/no.txt"], "No such file"),
        (["inspect", "{base}", "--text", "{tmp}"], "cannot be read (Is a directory)"),
        (["inspect", "{tmp}"], "must have a config.json"),
        (["push", "{tmp}", "ada/model"], "must have a config.json"),
        (["convert", "{base}", "{base}/config.json"], "config.json is a file"),
        (["translate"], "No such command 'translate'"),
    ],
    ids=lambda value: value[0] + "-" + value[-1].replace("{tmp}/", "") if isinstance(value, list) else "",
)
def test_bad_input_exits_with_2(kromhc, base, tmp_path, arguments, message):
    code, out, err = kromhc(*(argument.format(base=base, tmp=tmp_path) for argument in arguments))
    assert code == 2
    assert out == ""
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_families_lists_all_of_them(kromhc):
    code, out, _ = kromhc("families", "--json")
    rows = {row["model_type"]: row for row in json.loads(out)}
    assert code == 0
    supported = {*supported_model_types(), *composite_model_types()}
    assert {name for name, row in rows.items() if row["supported"]} == supported
    assert all(row["description"] for row in rows.values())
    code, out, _ = kromhc("families")
    assert code == 0
    assert all(name in out for name in rows)


def test_families_tells_of_types_that_it_has_no_row_for(kromhc, tmp_path):
    code, out, err = kromhc("families", "t5")
    assert (code, out) == (2, "")
    assert "model type 't5' has no row" in " ".join(err.split())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    code, out, _ = kromhc("families", tmp_path, "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert not row["supported"]
    assert row["description"] == "transformers has no causal language model of this type"
    assert "1 model type refused" in kromhc("families", tmp_path)[1]


@pytest.mark.parametrize(
    ("model_type", "changes", "found"),
    [
        ("opt", {"do_layer_norm_before": False}, (False, "do_layer_norm_before=True", "")),
        ("stablelm", {"use_parallel_residual": True}, (True, "mlp(input_layernorm(x))", "up to the rounding")),
        ("stablelm", {"use_parallel_residual": False}, (True, "mlp(post_attention_layernorm(x))", "bitwise equal")),
    ],
)
def test_families_tells_what_the_configuration_of_a_model_makes_of_its_row(
    kromhc, tmp_path, model_type, changes, found
):
    AutoConfig.for_model(model_type, **changes).save_pretrained(tmp_path)
    code, out, _ = kromhc("families", tmp_path, "--json")
    (row,) = json.loads(out)
    assert (code, row["supported"]) == (0, found[0])
    assert found[1] in row["description"]
    assert found[2] in row["exactness"]


def test_demo(kromhc, tmp_path):
    code, out, _ = kromhc("demo", "--output", tmp_path / "demo", "--steps", 3)
    assert code == 0
    assert "bitwise equal" in out
    assert "undone, the base is back bit for bit: yes" in out
    page = (tmp_path / "demo/demo.html").read_text(encoding="utf-8")
    numbers = json.loads(page.partition('id="numbers">')[2].partition("</script>")[0])
    plain, streams = numbers["without_streams"], numbers["with_streams"]
    assert plain["steps"] == streams["steps"] == [0, 1, 2, 3]
    # Equal to the bit before the training, and each of them better after it.
    assert plain["losses"][0] == streams["losses"][0]
    assert all(curve["losses"][-1] < curve["losses"][0] for curve in (plain, streams))
    assert f"loaded again: {streams['losses'][-1]:.3f}" in out
    assert page.count("<svg") == 1 + 2 * (1 + 8)
    # The commands to try next name what is there.
    code, _, _ = kromhc(*out.partition("    kromhc ")[2].partition("\n")[0].split(), "--max-tokens", 8)
    assert code == 0
    code, _, err = kromhc("demo", "--output", tmp_path / "demo")
    assert code == 2
    assert "demo is not empty. Remove it first." in err


def test_installed_command():
    result = subprocess.run([sys.executable, "-m", "kromhc_hf.cli", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("convert", "verify", "demo"))


def test_unrelated_models_are_not_compared(kromhc, base, tmp_path):
    kromhc("convert", base, tmp_path / "out", "--no-verify")
    config = configurations("llama")[0]
    for name, other, message in [
        ("mistral", configurations("mistral")[0], "the one is 'llama', the other 'mistral'"),
        ("letters", type(config)(**{**config.to_dict(), "vocab_size": 50}), "the one has 99 tokens in its vocabulary"),
        ("deep", type(config)(**{**config.to_dict(), "num_hidden_layers": 4}), "model.layers.3"),
        (
            "wide",
            type(config)(**{**config.to_dict(), "intermediate_size": 64}),
            "shape (48, 32) in the one and (64, 32)",
        ),
    ]:
        make_model(other).save_pretrained(tmp_path / name)
        for layers in ([], ["--layers", "0:2"]):
            code, out, err = kromhc("verify", tmp_path / name, tmp_path / "out", *layers)
            assert (code, out) == (2, "")
            assert "must be a converted form of" in err
            assert message in err


@pytest.mark.parametrize("content", [b"", b" \n\t", b"\xff\xfe"], ids=["nothing", "blank", "no-utf8"])
@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_text_without_text(kromhc, base, tmp_path, command, content):
    kromhc("convert", base, tmp_path / "out", "--no-verify")
    (tmp_path / "sample.txt").write_bytes(content)
    folders = [base, tmp_path / "out"][command == "inspect" :]
    code, out, err = kromhc(command, *folders, "--text", tmp_path / "sample.txt")
    assert (code, out) == (2, "")
    assert "--text must name a file" in err
    assert str(tmp_path / "sample.txt") in err
    with pytest.raises(ValueError, match="text must have at least one token"):
        verify_conversion(base, tmp_path / "out", text=" ")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("two\nlines"), 2, "error: RuntimeError: two lines (KROMHC_TRACEBACK=1 shows"),
        (KeyError("a"), 2, "error: KeyError: 'a' ("),
        (EOFError(), 2, "error: EOFError (KROMHC_TRACEBACK=1"),
        (ValueError("rule; value."), 2, "error: rule; value.\n"),
        (OSError(28, "No space left on device", "/x"), 2, "error: No space left on device: /x\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=repr,
)
def test_no_exception_is_a_traceback(kromhc, monkeypatch, error, code, message):
    def fail():
        raise error

    monkeypatch.setattr("kromhc_hf.families_table.families_table", fail)
    found, out, err = kromhc("families")
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    if isinstance(error, RuntimeError):
        monkeypatch.setenv("KROMHC_TRACEBACK", "1")
        found, _, err = kromhc("families")
        assert found == code
        assert "Traceback" in err


@pytest.mark.parametrize("arguments", [["families"], ["families", "--json"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_failed_check(arguments):
    command = [sys.executable, "-m", "kromhc_hf.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait() == 141
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize("command", ["convert", "verify", "inspect"])
def test_code_of_a_repository_is_never_offered(kromhc, base, tmp_path, monkeypatch, command):
    content = json.loads((base / "config.json").read_text())
    maps = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (base / "config.json").write_text(json.dumps({**content, "model_type": "own_llama", "auto_map": maps}))
    (base / "own.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    code, out, err = kromhc(
        command, base, *([tmp_path / "out"] * (command == "convert")), *([base] * (command == "verify"))
    )
    assert (code, out) == (2, "")
    assert "model_type must be one of the supported families" in err
    assert "trust_remote_code" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_serve_hands_its_arguments_to_the_server_of_transformers(kromhc, base, monkeypatch):
    given = []

    def server(arguments, standalone_mode):
        given.append(arguments)
        print("a line of the server's log")
        raise ImportError("Missing dependencies for serving.")

    monkeypatch.setattr("transformers.cli.transformers.app", server)
    code, out, err = kromhc("serve", base, "--port", "8123", "--dtype", "auto")
    assert given == [["serve", str(base), "--port", "8123", "--dtype", "auto"]]
    assert (code, out) == (2, "")
    assert "a line of the server's log" in err
    assert "pip install 'transformers[serving]'" in err


def test_serve_says_what_is_wrong_with_an_argument(kromhc, base, monkeypatch):
    class BadParameter(Exception):
        exit_code = 2

        def format_message(self):
            return "'abc' is not a valid integer."

    def server(arguments, standalone_mode):
        raise BadParameter

    monkeypatch.setattr("transformers.cli.transformers.app", server)
    code, out, err = kromhc("serve", base, "--port", "abc")
    assert (code, out, err.strip()) == (2, "", "error: transformers serve: 'abc' is not a valid integer.")
