"""What conversion writes, that it proves itself, and how little a large checkpoint takes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.folders import contents, to_earlier_layout
from support.sparse import sparse_llama
from support.tiny import configurations, make_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kromhc_hf import convert_checkpoint, hyper_connection_state_dict, verify_conversion
from kromhc_hf.conversion.files import find_weights, read_json
from kromhc_hf.modeling.variants import VARIANTS


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
REAL = ("stories15M", "stories260K", "gpt2-tinystories-1M", "gpt-nano-sort")


@pytest.mark.parametrize("num_streams", [2, 4, 8], ids="n{}".format)
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(shared, tmp_path, name, num_streams):
    source = shared / "models" / name
    before = contents(source)
    report = convert_checkpoint(source, tmp_path / "out", num_streams=num_streams, verify=True)
    assert contents(source) == before
    assert report.lossless
    assert report.bitwise_equal
    assert report.max_logit_difference == report.mean_kl == 0
    assert report.top1_agreement == 1
    assert report.greedy_base == report.greedy_converted
    assert report.text == (name != "gpt-nano-sort")
    written = contents(tmp_path / "out")
    weights = {file for file in written if "safetensors" in file}
    assert weights == {FIRST, SECOND, "model.safetensors.index.json"}
    assert written[FIRST] == before["model.safetensors"]
    assert "transformers_weights" not in json.loads(written["config.json"])
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= written.keys()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values())
    added = {name: p for name, p in model.named_parameters() if "_hc." in name}
    assert report.added_parameters == sum(p.numel() for p in added.values())
    assert report.added_bytes == 4 * report.added_parameters
    assert {p.dtype for p in added.values()} == {torch.float32}
    with safe_open(source / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= set(model.state_dict())
        assert report.base_tensors == len(list(file.keys()))


def test_the_plain_model_with_one_stream_is_converted_too(tmp_path):
    model = make_model(configurations("llama")[0])
    model.save_pretrained(tmp_path / "base")
    report = convert_checkpoint(tmp_path / "base", tmp_path / "out", num_streams=1, verify=True)
    assert (report.bitwise_equal, report.added_parameters) == (True, 0)
    assert verify_conversion(tmp_path / "base", tmp_path / "out", layers="all").bitwise_equal
    with pytest.raises(ValueError, match="must have hyper-connections with parameters"):
        hyper_connection_state_dict(model)


def test_tokenizer_comes_along(shared, tmp_path):
    convert_checkpoint(shared / "models/stories15M", tmp_path / "out")
    text = "Once upon a time, in a house by the sea"
    first, second = (AutoTokenizer.from_pretrained(f) for f in (shared / "models/stories15M", tmp_path / "out"))
    assert type(first) is type(second)
    assert first(text) == second(text)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox", "gpt2"])
def test_sharded_base(tmp_path, family):
    model = make_model(configurations(family)[0], torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    before = contents(tmp_path / "base")
    report = convert_checkpoint(tmp_path / "base", tmp_path / "out", num_streams=6, verify=True)
    assert report.bitwise_equal
    assert not report.text
    written = contents(tmp_path / "out")
    shards = [name for name in before if name.endswith(".safetensors")]
    assert len(shards) > 2
    count = len(shards) + 1
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    assert [name for name in sorted(written) if name.endswith(".safetensors")] == names
    assert [written[name] for name in names[:-1]] == [before[name] for name in sorted(shards)]
    index, metadata = (json.loads(written["model.safetensors.index.json"])[k] for k in ("weight_map", "metadata"))
    tensors = (tensor for name in names for tensor in load_file(tmp_path / "out" / name).values())
    assert metadata["total_size"] == sum(tensor.nbytes for tensor in tensors)
    old = json.loads(before["model.safetensors.index.json"])["weight_map"]
    renamed = dict(zip(sorted(shards), names))
    assert {name: renamed[file] for name, file in old.items()}.items() < index.items()
    assert {file for name, file in index.items() if name not in old} == {names[-1]}
    assert "transformers_weights" not in json.loads(written["config.json"])
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    tokens = token_ids(model.config)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_shards_of_other_names(tmp_path):
    """A base whose index names its files in its own way, and a tensor that shares its file with none of the others."""
    model = make_model(configurations("qwen3")[0])
    model.save_pretrained(tmp_path / "base")
    state = load_file(tmp_path / "base/model.safetensors")
    (tmp_path / "base/model.safetensors").unlink()
    files = {"weights-b.safetensors": list(state)[:1], "model.safetensors-1-of-2.safetensors": list(state)[1:]}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, tmp_path / "base" / file, metadata={"format": "pt"})
    index = {name: file for file, held in files.items() for name in held}
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert convert_checkpoint(tmp_path / "base", tmp_path / "out", verify=True).bitwise_equal
    found = find_weights(tmp_path / "out", {})
    assert found.files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert found.tensors[next(iter(state))] == found.files[1]


def test_nothing_added_is_the_file_alone(base, tmp_path):
    """Without a second file there is no shard, and without shards no index."""
    convert_checkpoint(base, tmp_path / "out", variant="identity", dynamic=False, verify=True)
    written = contents(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    names = {"model.safetensors"} if not hyper_connection_state_dict(model) else {FIRST, SECOND}
    assert {name for name in written if name.endswith(".safetensors")} == names


@pytest.mark.parametrize("sizes", [("1GB",), ("40KB",), ("1GB", "40KB"), ("40KB", "1GB")], ids="-then-".join)
def test_saving_trained_weights_into_the_same_folder(base, tmp_path, sizes):
    """What was trained last is all there is: nothing of the conversion or of another save is left that a tool reads."""
    convert_checkpoint(base, tmp_path / "out", link="hardlink")
    before = contents(base)
    for step, size in enumerate(sizes):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        with torch.no_grad():
            model.model.layers[0].attn_hc.bias.fill_(step + 0.5)
        model.save_pretrained(tmp_path / "out", max_shard_size=size)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert (again.model.layers[0].attn_hc.bias == len(sizes) - 0.5).all()
    found = find_weights(tmp_path / "out", {})
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == set(found.files)
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (len(found.files) > 1)
    assert contents(base) == before


@pytest.mark.parametrize("sizes", [("1GB", "40KB"), ("40KB", "1GB")], ids="-then-".join)
def test_saving_over_weights_from_the_future(base, tmp_path, sizes):
    """As an archive from another time zone leaves them, or a clock that was set back."""
    out = tmp_path / "out"
    convert_checkpoint(base, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(out, max_shard_size=sizes[0])
    for path in out.iterdir():
        os.utime(path, (2**32, 2**32))
    with torch.no_grad():
        model.model.layers[0].attn_hc.bias.fill_(0.5)
    model.save_pretrained(out, max_shard_size=sizes[1])
    again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert (again.model.layers[0].attn_hc.bias == 0.5).all()


def test_folders_of_the_earlier_layout(base, tmp_path):
    """Their own index goes on being read, and saving them again gives the standard names."""
    convert_checkpoint(base, tmp_path / "out", variant="mhc")
    to_earlier_layout(tmp_path / "out", tmp_path / "earlier")
    assert verify_conversion(base, tmp_path / "earlier").bitwise_equal
    assert verify_conversion(base, tmp_path / "earlier", layers="all").bitwise_equal
    assert find_weights(tmp_path / "earlier", read_json(tmp_path / "earlier/config.json")).files == [
        "kromhc.safetensors",
        "model.safetensors",
    ]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "earlier", output_loading_info=True)
    assert not any(info.values())
    model.save_pretrained(tmp_path / "again")
    assert find_weights(tmp_path / "again", {}).tensors.keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="has been converted already .* Convert its base model instead"):
        convert_checkpoint(tmp_path / "earlier", tmp_path / "twice")


def test_accelerate_loads_all_of_it(base, tmp_path):
    """Every tensor is found by a tool that knows the standard names and nothing else."""
    convert_checkpoint(base, tmp_path / "out", init="paper")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    model.tie_weights()
    load_checkpoint_and_dispatch(model, str(tmp_path / "out"), device_map={"": "cpu"}, strict=True)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "kromhc"])
def test_other_variants_and_learned_ends(base, tmp_path, variant):
    report = convert_checkpoint(
        base, tmp_path / "out", variant=variant, readout="softmax", stream_embedding=True, verify=True
    )
    assert report.bitwise_equal
    assert report.variant == variant
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert {"expand_hc", "readout_hc"} <= {name.rpartition(".")[2] for name, _ in model.named_modules()}


def test_paper_init_is_reported_as_different(base, tmp_path):
    report = convert_checkpoint(base, tmp_path / "out", init="paper", readout="sum", verify=True)
    assert not report.lossless_init
    assert not report.lossless
    assert report.max_logit_difference > 0.01 * report.max_logit
    assert report.mean_kl > 1e-5
    assert report.passed


def test_a_broken_promise_is_seen(base, tmp_path):
    convert_checkpoint(base, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.model.layers[1].ffn_hc.bias[5] += 0.01  # a write weight
    model.save_pretrained(tmp_path / "changed")
    report = verify_conversion(base, tmp_path / "changed")
    assert report.lossless_init
    assert not report.lossless
    assert not report.bitwise_equal
    assert not report.passed
    assert 0 < report.max_logit_difference < report.max_logit


def test_half_precision_must_be_bitwise(base, tmp_path):
    """A difference of one bf16 rounding in one logit fails, although it is far below what fp32 may differ by."""
    convert_checkpoint(base, tmp_path / "out")
    assert verify_conversion(base, tmp_path / "out", dtype="bfloat16").bitwise_equal
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[5] *= 1 + 2**-7
    model.save_pretrained(tmp_path / "changed")
    assert not verify_conversion(base, tmp_path / "changed", dtype="bfloat16").lossless


@pytest.mark.parametrize("family", ["cohere", "stablelm"])
def test_half_precision_of_reordered_sums_is_compared_in_fp32(tmp_path, family):
    """Equal functions differ in half precision where branches are added in another order."""
    reordered = next(config for config in configurations(family) if getattr(config, "use_parallel_residual", True))
    make_model(reordered, torch.bfloat16).save_pretrained(tmp_path / "base")
    base, out = tmp_path / "base", tmp_path / "out"
    report = convert_checkpoint(base, out, verify=True)
    assert (report.dtype, report.lossless, report.passed) == ("float32", True, True)
    assert verify_conversion(base, out, layers="all").lossless
    for dtype in (torch.bfloat16, "float16"):
        with pytest.raises(ValueError, match=f"dtype must be float32 for {family}, .* or use float32"):
            verify_conversion(base, out, dtype=dtype)


@pytest.mark.parametrize("num_streams", [0, -1, 7, "4"])
def test_bad_options_leave_nothing(base, tmp_path, num_streams):
    with pytest.raises(ValueError, match="num_streams must"):
        convert_checkpoint(base, tmp_path / "out", num_streams=num_streams)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


MEASURE = """
import json, sys, time
import kromhc_hf
kromhc_hf.verify_conversion, kromhc_hf.KromHCForCausalLM  # torch and all else that is imported when it is needed
def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
before, start = kilobytes("VmRSS"), time.process_time()
report = kromhc_hf.convert_checkpoint(sys.argv[1], sys.argv[2], link="hardlink", num_streams=int(sys.argv[3]))
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "megabytes": (kilobytes("VmHWM") - before) / 1024, **report.to_dict()}))
"""


@pytest.mark.parametrize("num_streams", [4, 16], ids="n{}".format)
def test_eight_gigabytes_in_forty_shards(tmp_path, num_streams):
    size = sparse_llama(tmp_path / "base")
    assert size > 8e9
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == 40
    command = [sys.executable, "-c", MEASURE, tmp_path / "base", tmp_path / "out", str(num_streams)]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert report["base_tensors"] == 19 * 9 + 3
    # At n=16 the new tensors alone are 340 MB.
    assert report["added_bytes"] > {4: 24e6, 16: 340e6}[num_streams]
    assert report["megabytes"] < 150
    # Processor time: the clock on the wall also counts what else runs; benchmarks/conversion.py shows it.
    if num_streams == 4:
        assert report["seconds"] < 2
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 41
    with safe_open(tmp_path / "out/model-00041-of-00041.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.18.ffn_hc.alpha").tolist() == pytest.approx([0.01] * 3)
