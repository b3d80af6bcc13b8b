"""PEFT's own decoder tests on models with hyper-connections: nothing fails or is skipped that passes natively."""

import os

import pytest
from support.peft_suite import FAILED, PASSED, configs, fetch_suite, names_of_tests, run, save_models


# A few of each kind; KROMHC_FULL=1 runs all tests of all configurations on both families.
FULL = os.environ.get("KROMHC_FULL") == "1"
SHORT_TESTS = {
    "test_save_pretrained",
    "test_merge_layers",
    "test_generate",
    "test_training_decoders",
    "test_training_decoders_gradient_checkpointing",
    "test_delete_adapter",
    "test_unload_adapter",
    "test_disable_adapter",
    "test_passing_input_embeds_works",
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", autouse=True)
def suite():
    return fetch_suite()


# It demands that a new adapter changes the output. LN tuning starts as a copy of the norms, and whether that changes
# the output is a matter of the last bit, natively too.
ILL_POSED = {("LNTuning", "test_disable_adapter")}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["Lora", "IA3", "PromptTuning", "LNTuning", "TrainableTokens"])
def test_decoder_tests_of_peft(models, method, model_type):
    connected, native = models[model_type]
    chosen = [(name, cls, options) for name, cls, options in configs() if cls.__name__ == f"{method}Config"]
    assert chosen
    passed, ours = 0, []
    for name, cls, options in chosen if FULL else chosen[:1]:
        for test in names_of_tests() if FULL else sorted(SHORT_TESTS):
            if (method, test) in ILL_POSED:
                continue
            status, detail = run(test, connected, cls, options)
            passed += status == PASSED
            if status != PASSED and run(test, native, cls, options)[0] == PASSED:
                ours.append(f"{test} {name}: {status}, passes natively\n{detail}")
            elif status == FAILED:
                print(f"{test} {name}: fails natively as well\n{detail}")
    assert not ours, "\n\n".join(ours)
    # Merging and the like do not exist for prompt tuning; everything else has most of the tests.
    assert passed >= (4 if method == "PromptTuning" else 6)
