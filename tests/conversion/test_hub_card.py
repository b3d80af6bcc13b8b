"""The model card of what is pushed: what it says, and when it is written anew."""

from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM

from kromhc_hf import push_checkpoint
from kromhc_hf.modeling.model_card import MARK


def test_model_card(hub, converted):
    push_checkpoint(converted, "ada/model")
    card = ModelCard.load("ada/model")
    assert card.data.base_model == "ada/base"
    assert (card.data.license, card.data.license_name) == ("other", "tiny")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"kromhc", "hyper-connections"} <= set(card.data.tags)
    for text in (
        "# model",
        'from_pretrained("ada/model")',
        'from_pretrained("ada/model", trust_remote_code=True)',
        "pip install kromhc-hf",
        "| logits | bitwise equal |",
        "| lossless | yes |",
        "random tokens in float32",
        "eprint = {2601.21579}",
    ):
        assert text in card.text, text


def test_a_card_of_ones_own_is_kept(hub, converted):
    own = "---\ntags:\n- mine\n---\n# Mine\n"
    (converted / "README.md").write_text(own)
    push_checkpoint(converted, "ada/model")
    assert hub.files("ada/model")["README.md"].decode() == own
    AutoModelForCausalLM.from_pretrained("ada/model").push_to_hub("ada/model")
    assert ModelCard.load("ada/model").text.strip() == "# Mine"


def test_a_card_with_the_mark_is_written_anew(hub, converted):
    """Whatever else is in it, such as the wording of another version."""
    (converted / "README.md").write_text(f"---\nlicense: mit\n---\n{MARK}\n\n# Older words\n")
    push_checkpoint(converted, "ada/model")
    pushed = hub.files("ada/model")["README.md"].decode()
    assert pushed.splitlines().count(MARK) == 1
    assert "Older words" not in pushed
    assert 'from_pretrained("ada/model")' in pushed
    model = AutoModelForCausalLM.from_pretrained(converted)
    model.config.hc_conversion = {}
    model.push_to_hub("ada/model", tags=["poetry"])
    card = ModelCard.load("ada/model")
    assert "poetry" in card.data.tags
    assert "base_model" not in card.data.to_dict()
    assert card.text.strip().startswith(MARK)


def test_a_configuration_saved_beside_its_model(hub, converted):
    AutoConfig.from_pretrained(converted).save_pretrained(str(converted), push_to_hub=True, repo_id="ada/model")
    card = (converted / "README.md").read_text()
    assert "A configuration with" not in card
    assert 'from_pretrained("ada/model")' in card
