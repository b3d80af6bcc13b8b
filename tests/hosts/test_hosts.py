"""A sample of families on the oldest and on the newest release of transformers; all of them are `make hosts`."""

import json

import pytest
from hosts.outcomes import CHECKS, COMPOSITE_CHECKS, Outcome, compare, merged, ours, tables, to_json
from hosts.releases import FLOOR, ROOT, install, newest
from hosts.run import BEGIN, END, across, process, run, shown


# Plain and parallel layers, positional arguments, tuples, experts, recurrent and mixed kinds of layers.
SAMPLE = ("llama", "gpt2", "gptj", "falcon-0", "cohere", "mixtral", "moshi", "mamba", "lfm2")
# The pins of trainers and servers.
SERVED = (FLOOR, "5.16.1", "5.19.0")


def installed(release: str) -> str:
    try:
        install(release)
    except RuntimeError as error:
        pytest.skip(f"transformers {release} cannot be installed: {error}")
    return release


@pytest.fixture
def latest() -> str:
    try:
        return installed(newest())
    except RuntimeError as error:
        pytest.skip(f"the index cannot be read: {error}")


def test_a_sample_of_families_on_the_oldest_and_the_newest_release(latest, tmp_path):
    summaries = run((installed(FLOOR), latest), SAMPLE, tmp_path)
    assert ours(summaries) == []
    # Of the sample, the oldest release has all families and can do everything.
    for checks in summaries.values():
        assert {check: summary["passed"] for check, summary in checks.items()} == dict.fromkeys(checks, len(SAMPLE))
    assert list(summaries[FLOOR]) == list(CHECKS)


def test_a_folder_converted_on_the_newest_release_generates_the_same_without_the_package(latest, tmp_path):
    process("converted.py", latest, [str(tmp_path / latest)], tmp_path)
    for release in SERVED:
        found = across(latest, installed(release), "converted", tmp_path)
        assert found["converted"] == dict.fromkeys(["demo", "gpt2", "lfm2", "llama", "mixtral"], Outcome())


def test_a_family_that_a_release_lacks_is_refused_with_what_to_do(latest, tmp_path):
    """lfm3 came with 5.23."""
    run((latest,), ("lfm3",), tmp_path)
    found = process("absent.py", installed(FLOOR), [str(tmp_path / latest / "lfm3" / "connected")], tmp_path, bare=True)
    assert found == {}
    said = (tmp_path / "absent.txt").read_text()
    assert "does not have its family. Install the release that transformers_version in the config.json" in said


def test_the_page_shows_what_was_found():
    page, content = ROOT / "docs" / "hosts.md", json.loads((ROOT / "docs" / "hosts.json").read_text())
    assert page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip() == shown(content)
    assert ours(content["releases"]) == []


def raising(error):
    def run():
        raise error

    return run


def test_a_failure_is_ours_where_the_native_model_passes():
    assert compare(lambda: "", lambda: "") == Outcome()
    assert compare(lambda: "", lambda: "differs") == Outcome("differs")
    assert compare(lambda: "differs", lambda: "") == Outcome("differs", native=True)
    assert compare(lambda: "", raising(KeyError("conv"))) == Outcome("KeyError: 'conv'")
    assert compare(raising(ValueError("first\nsecond")), lambda: "") == Outcome("ValueError: first", native=True)


def test_the_table_gives_the_reason_for_every_cell_that_is_not_yes():
    passed = {check: {"llama": Outcome(), "dbrx": Outcome()} for check in CHECKS}
    old = merged([passed, {"generation": {"dbrx": Outcome("RuntimeError: a", native=True)}}])
    several = {check: {"llava": Outcome()} for check in COMPOSITE_CHECKS}
    newer = merged([passed, {"saving": {"llama": Outcome("loaded logits differ")}}, several])
    summaries = {"5.6.2": to_json(old), "5.24.0": to_json(newer)}
    assert ours(summaries) == ["5.24.0, saving, llama: loaded logits differ"]
    lines = tables(summaries).splitlines()
    assert lines[2] == f"| 5.6.2 | 2 | yes | 1 of 2 |{' yes |' * 5}"
    assert lines[3] == f"| 5.24.0 | 2 | yes | yes | yes | 1 of 2 |{' yes |' * 3}"
    composite = lines.index("| 5.24.0 | 1 | yes | yes | yes | yes |")
    assert lines[composite - 1] == "| 5.6.2 |  |  |  |  |  |"
    assert lines[composite - 6 : composite - 4] == [
        "- dbrx, the native model as well: RuntimeError: a. (5.6.2: generation)",
        "- llama, **ours alone**: loaded logits differ. (5.24.0: saving)",
    ]


def test_the_same_reason_on_several_releases_is_one_line():
    passed = {check: {"dbrx": Outcome()} for check in CHECKS}
    failed = {check: {"dbrx": Outcome("size", native=True)} for check in ("logits", "saving")}
    found = {release: to_json(merged([passed, failed])) for release in ("5.6.2", "5.10.4")}
    found["5.13.1"] = to_json(merged([passed, {"logits": failed["logits"]}]))
    (line,) = [line for line in tables(found).splitlines() if line.startswith("- dbrx")]
    assert line == "- dbrx, the native model as well: size. (5.6.2, 5.10.4: logits, saving; 5.13.1: logits)"
