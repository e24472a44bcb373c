"""networks/arithmetic/result_metadata.py: what results of the tools say of themselves, as kohya-style files do."""

from __future__ import annotations

import json
from datetime import datetime

from networks.arithmetic.result_metadata import (
    ResultInfo,
    merged_metadata,
    minimal_metadata,
    ranks,
    resized_metadata,
    title_of,
)
from tests.networks.random_loras import KERNEL, LINEAR, layer

ABOUT = ResultInfo(
    "both", datetime(2026, 2, 3, 4, 5, 6, 789), ["dog", "Ink 2"], {"architecture": "stable-diffusion-v1/lora"}
)
ONE = {
    "ss_v2": "False",
    "ss_base_model_version": "sd_v1",
    "ss_network_module": "networks.dylora",
    "ss_network_dim": "8",
    "ss_network_alpha": "4",
    "ss_network_args": '{"conv_dim": "8", "block_dims": "1,2", "dropout": null}',
    "ss_seed": "1",
    "ss_clip_skip": "2",
    "ss_training_comment": "first try",
    "sshs_model_hash": "aa",
    "sshs_legacy_hash": "bb",
    "modelspec.title": "dog",
    "modelspec.license": "CC",
    "modelspec.hash_sha256": "cc",
}


def test_one_rank_is_a_number_and_several_are_dynamic() -> None:
    same = {"a": layer(LINEAR, 4, 2.0), "b": layer(LINEAR, 4, 2.0)}
    assert ranks(same) == {"ss_network_dim": "4", "ss_network_alpha": "2.0"}
    assert ranks(same | {"c": layer(LINEAR, 3, 1.5)}) == {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    found = ranks(same | {"c": layer(KERNEL, 3, 1.5)})
    assert found["ss_network_dim"] == "4" and json.loads(found["ss_network_args"]) == {
        "conv_dim": "3",
        "conv_alpha": "1.5",
    }


def test_a_resized_file_keeps_what_still_holds() -> None:
    found = resized_metadata(
        ONE, {"a": layer(LINEAR, 4, 2.0), "b": layer(KERNEL, 2, 1.0)}, "dimension is resized from 8 to 4"
    )
    assert found["ss_training_comment"] == "dimension is resized from 8 to 4; first try"
    assert (found["ss_network_dim"], found["ss_network_alpha"], found["ss_seed"]) == ("4", "2.0", "1")
    assert json.loads(found["ss_network_args"]) == {"dropout": None, "conv_dim": "2", "conv_alpha": "1.0"}
    assert found["ss_network_module"] == "networks.lora"  # the source was a DyLoRA
    assert not {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"} & found.keys()


def test_a_sum_keeps_shared_entries_and_names_its_sources() -> None:
    other = ONE | {"ss_seed": "2", "modelspec.title": "Ink 2", "ss_network_module": "networks.lora"}
    found = merged_metadata([ONE, other], {"a": layer(LINEAR, 4, 2.0)}, ABOUT)
    assert found["modelspec.title"] == "both" and found["modelspec.merged_from"] == "dog, Ink 2"
    assert found["modelspec.date"] == "2026-02-03T04:05:06" and found["modelspec.license"] == "CC"
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["ss_network_module"] == "networks.lora" and found["ss_network_dim"] == "4"
    assert found["ss_clip_skip"] == "2" and "ss_seed" not in found and "sshs_model_hash" not in found
    assert "ss_network_args" not in found


def test_a_source_without_metadata_has_no_say() -> None:
    found = merged_metadata([{}, ONE], {"a": layer(LINEAR, 4, 2.0)}, ABOUT)
    assert found["ss_base_model_version"] == "sd_v1" and found["ss_v2"] == "False"
    assert minimal_metadata(found).keys() == {
        "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha",
    }  # fmt: skip


def test_titles() -> None:
    assert title_of({"modelspec.title": "My dog"}, "dog_v2") == "My dog" and title_of({}, "dog_v2") == "dog_v2"
