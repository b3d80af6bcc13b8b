"""Checkpoints with streams in some layers only: converted, verified and looked at on the command line."""

import json

import pytest
from support.tiny import configurations, make_model
from transformers import AutoConfig

from kromhc_hf import convert_checkpoint


@pytest.fixture
def base(tmp_path):
    make_model(configurations("llama")[0]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_streams_in_some_layers(kromhc, base, tmp_path):
    for text, kept, words in (("-1:", (2, 3), "in layers 2"), ("0:2", (0, 2), "in layers 0 to 1")):
        folder = tmp_path / text.replace(":", "")
        code, out, _ = kromhc("convert", base, folder, "--layers", text)
        assert code == 0
        assert f"init identity, {words}" in out
        assert "bitwise equal" in out
        assert AutoConfig.from_pretrained(folder).hc_layers == kept
        assert f"| layers with streams | {words.removeprefix('in layers ')} |" in (folder / "README.md").read_text()
        code, out, _ = kromhc("verify", base, folder, "--layerwise", "all", "--json")
        report = json.loads(out)
        assert (code, report["stream_layers"], report["layers"]) == (0, [*kept], [0, 1, 2])
        assert report["bitwise_equal"]
        assert report["first_different_layer"] is None
        code, out, _ = kromhc("verify", base, folder, "--layerwise", "1:3")
        assert code == 0
        code, out, _ = kromhc("inspect", folder, "--json")
        names = {name.split(".")[1] for name in json.loads(out)["model"]["branches"]}
        assert names == {str(position) for position in range(*kept)}


@pytest.mark.parametrize("options", [{"layers": (9, 12)}, {"layers": (0, 2), "readout": "norm_sum", "init": "paper"}])
def test_a_refusal_names_the_option_as_it_was_given(base, tmp_path, options):
    with pytest.raises(ValueError, match=r"(?!.*hc_).* layers='\d:\d?'"):
        convert_checkpoint(base, tmp_path / "out", **options)
