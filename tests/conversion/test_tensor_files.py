"""Pickled bases, which are read without running their code, and the writer of safetensors."""

import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.folders import contents, only
from support.tiny import configurations, make_model, token_ids
from transformers import AutoModelForCausalLM

from kromhc_hf import convert_checkpoint
from kromhc_hf.conversion.tensor_files import DTYPE_NAMES, TensorForm, write_safetensors


PICKLED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", PICKLED)
@pytest.mark.parametrize("kind", ["single", "sharded", "legacy"])
def test_pickled_bases(tmp_path, kind, dtype):
    model = make_model(configurations("gpt_neox")[0], PICKLED[dtype])
    base = tmp_path / "base"
    model.config.save_pretrained(base)
    state = {**model.state_dict(), "steps": torch.tensor(7), "flags": torch.tensor([True, False, True])}
    if kind == "sharded":
        names = list(state)
        shards = {f"pytorch_model-0000{i + 1}-of-00003.bin": names[i::3] for i in range(3)}
        for file, held in shards.items():
            torch.save({name: state[name] for name in held}, base / file)
        weight_map = {name: file for file, held in shards.items() for name in held}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        torch.save(state, base / "pytorch_model.bin", _use_new_zipfile_serialization=kind != "legacy")
    before = contents(base)
    with pytest.warns(UserWarning, match="link='hardlink' has no effect: the weights of .* are .bin files"):
        report = convert_checkpoint(base, tmp_path / "out", verify=True, link="hardlink")
    assert report.bitwise_equal
    assert report.base_tensors == len(state)
    assert contents(base) == before
    written = list((tmp_path / "out").glob("model*.safetensors"))
    assert len(written) == (4 if kind == "sharded" else 2)
    assert not list((tmp_path / "out").glob("*.bin"))
    loaded = {name: tensor for path in sorted(written)[:-1] for name, tensor in load_file(path).items()}
    assert loaded.keys() == state.keys()
    assert all(loaded[name].dtype == state[name].dtype and torch.equal(loaded[name], state[name]) for name in state)
    tokens = token_ids(model.config)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(converted(tokens).logits, model(tokens).logits)


def test_tied_weights_in_a_pickled_base(tmp_path):
    config = configurations("llama")[0]
    config.tie_word_embeddings = True
    model = make_model(config)
    config.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "base/pytorch_model.bin")
    assert convert_checkpoint(tmp_path / "base", tmp_path / "out", verify=True).bitwise_equal


class Evil:
    def __init__(self, trace: str):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain"])
def test_a_pickle_that_runs_code_is_refused(base, tmp_path, protocol):
    for path in base.glob("model*"):
        path.unlink()
    content = {"model.norm.weight": torch.zeros(32), "evil": Evil(str(tmp_path / "ran"))}
    if protocol == "plain":
        (base / "pytorch_model.bin").write_bytes(pickle.dumps(content["evil"]))
    else:
        torch.save(content, base / "pytorch_model.bin", _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(
        ValueError, match="pytorch_model.bin must be a complete file of torch.save that holds tensors alone"
    ):
        convert_checkpoint(base, tmp_path / "out")
    assert only(tmp_path, "base")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.zeros(1)}}, "must hold a dictionary of tensors; got dict under 'state_dict'"),
        ([torch.zeros(1)], "must hold a dictionary of tensors; got list"),
    ],
    ids=["nested", "list"],
)
def test_other_things_in_a_pickle(base, tmp_path, content, message):
    for path in base.glob("model*"):
        path.unlink()
    torch.save(content, base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(base, tmp_path / "out")
    assert only(tmp_path, "base")


def test_a_dtype_that_safetensors_does_not_know(base, tmp_path):
    tensors = {**load_file(base / "model.safetensors"), "a": torch.zeros(1, dtype=torch.complex64)}
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"a must have a dtype that safetensors knows; got torch\.complex64"):
        convert_checkpoint(base, tmp_path / "out")
    assert only(tmp_path, "base")


def test_damaged_pickles_are_named(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    shard = base / "pytorch_model-00001-of-00001.bin"
    torch.save(tensors, shard)
    index = base / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, "b"], shard.name)}))
    with pytest.raises(ValueError, match=rf"{shard.name} must hold 'b' according to {index.name}"):
        convert_checkpoint(base, tmp_path / "out")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ValueError, match=rf"{shard.name} must be a complete file of torch.save"):
        convert_checkpoint(base, tmp_path / "out")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names the file '{shard.name}'"):
        convert_checkpoint(base, tmp_path / "out")
    assert only(tmp_path, "base")


def test_writer_agrees_with_safetensors(tmp_path):
    tensors = {
        f"{name}-{shape}": torch.randint(0, 2, shape).to(dtype)
        for dtype, name in DTYPE_NAMES.items()
        for shape in ((), (0,), (3,), (2, 3))
    }
    write_safetensors(tmp_path / "file", {n: TensorForm.of(t) for n, t in tensors.items()}, tensors.items(), {"a": "b"})
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(
            loaded[name].view(torch.uint8) if tensor.dim() else loaded[name].double(),
            tensor.view(torch.uint8) if tensor.dim() else tensor.double(),
        )
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(3)}, "a must be the next tensor"),
        ({"a": torch.zeros(2), "c": torch.zeros(1)}, "c must be the next tensor"),
        ({"a": torch.zeros(2)}, "b did not come"),
        ({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)}, "c must be the next tensor"),
    ],
    ids=["other-shape", "other-name", "too-few", "too-many"],
)
def test_writer_keeps_to_its_header(tmp_path, tensors, message):
    forms = {"a": TensorForm(torch.float32, (2,)), "b": TensorForm(torch.float32, (1,))}
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "file", forms, tensors.items())
