"""The configuration: YAML 1.2 scalars, layers, types, and unknown keys refused with the nearest known one."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from megapoly.checks import check, padded_vocab_size
from megapoly.cli import parse_flags, refuse_unknown
from megapoly.config import LEAVES, SECTIONS, load_config, preset_names
from megapoly.errors import ConfigError
from megapoly.yaml12 import parse_yaml


def test_yaml_scalars_are_those_of_yaml_1_2() -> None:
    tree = parse_yaml(
        "a: no\nb: 638e9\nc: 3e-5\nd: true\ne: 1:30\nf: 2020-01-01\ng: 0o17\nh: 0x1F\ni: ~\nj: 010\n", "t"
    )
    assert tree == {
        "a": "no", "b": 638e9, "c": 3e-5, "d": True, "e": "1:30", "f": "2020-01-01", "g": 15, "h": 31, "i": None, "j": 10,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: [1", "? [a]\n: 1", "!!python/object/apply:os.system [id]", "1: 2"])
def test_yaml_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="t, line|t:"):
        parse_yaml(text, "t")


def test_names_that_no_file_can_have_are_just_not_there(tmp_path: Path) -> None:
    name = "a" * 300
    with pytest.raises(ConfigError, match="neither a file nor a preset"):
        load_config(name)
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: {{sources: [{{name: {name}, language: ko}}]}}")
    for cfg in (load_config(str(path)), load_config(str(path), {"data_root": name})):
        assert cfg.data.sources[0].valid_paths == []


def test_leaf_names_are_unique() -> None:
    names = [field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names)) == len(LEAVES)


def test_layers_file_over_preset_over_tiny_and_flags_last(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: gecko-tiny\nmodel: {num_layers: 6}\ntrain: {seed: 7}\n")
    cfg = load_config(str(path), {"seed": 8})
    assert cfg.model.num_layers == 6  # the file
    assert cfg.model.activation == "swiglu"  # its preset
    assert cfg.train.global_batch_size == load_config("tiny").train.global_batch_size  # tiny
    assert cfg.train.seed == 8  # the flag


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_layer: 3}", "unknown key 'num_layer'; did you mean 'num_layers'"),
        ("modle: {}", "unknown section 'modle'; did you mean 'model'"),
        ("num_layers: 3", "belongs into section 'model'"),
        ("model: {num_layers: three}", "must be a whole number, not 'three'"),
        ("model: {num_layers: 2.5}", "must be a whole number, not 2.5"),
        ("model: {num_layers: true}", "must be a whole number, not True"),
        ("model: {activation: relu}", "must be one of gelu_tanh"),
        ("preset: tinny", "preset 'tinny' is unknown; did you mean 'tiny'"),
        ("curriculum: {stages: [{name: a, tokens: 1e6, non_english_shar: 0.3}]}", "did you mean 'non_english_share'"),
        ("curriculum: {stages: [{name: a}]}", "key 'tokens' is missing"),
        ("curriculum: {stages: [{share: 1}]}", "'share'; did you mean 'non_english_share' or 'code_share'?"),
        ("curriculum: {stages: [{max_epochs: 1}]}", "'max_epochs'; it belongs into section 'curriculum'"),
        ("curriculum: {stages: [{tokens: 638B}]}", "tokens must be a whole number, not '638B'; write 638e9"),
        ("curriculum: {stages: [{tokens: 1.5 T}]}", "a whole number, not '1.5 T'; write 1.5e12"),
        ("curriculum: {stages: [{code_share: 7.5%}]}", "code_share must be a number, not '7.5%'; write 0.075"),
        ("curriculum: {stages: [{non_english_share: [1]}]}", "must be a number or a mapping of keys, not [1]"),
        ("optimizer: {weight_decay: 1e300}", "weight_decay must be a number within 1e300, not 1e+300"),
        ("curriculum: {stages: [{name: 5}]}", "name must be a string, not 5"),
        ("- a", "top level must be sections"),
        ("model: 3", "section 'model' must hold keys"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml") as caught:
        load_config(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_presets_and_files_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'polylm-13b'"):
        load_config("polylm-13")


def test_flags_take_megatrons_forms() -> None:
    flags, rest = parse_flags(
        [
            "--tensor-model-parallel-size",
            "2",
            "--bf16",
            "--lr=3e-5",
            "--pipeline-layer-split",
            "3,2",
            "--swiglu",
            "--no-tensorboard",
            "--sequence-parallel",
            "false",
            "--save",
            "0123",
            "word",
            "--unknown",
        ]
    )
    assert flags == {
        "tensor_model_parallel_size": 2, "bf16": True, "lr": 3e-5, "pipeline_layer_split": [3, 2], "activation": "swiglu",
        "tensorboard": False, "sequence_parallel": False, "save": "0123",
    }  # fmt: skip
    assert rest == ["word", "--unknown"]


def test_a_list_may_stand_in_several_words() -> None:
    expected = {"rampup_batch_size": [16, 8, 3000], "lr": 1e-3}
    for words in (["16,8,3000"], ["16", "8", "3000"]):
        assert parse_flags(["--rampup-batch-size", *words, "--lr", "1e-3"]) == (expected, [])


def test_a_misspelt_flag_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown flag --micro-batch-sise; did you mean 'micro-batch-size'"):
        refuse_unknown(["--micro-batch-sise"])
    with pytest.raises(ConfigError, match="needs a value"):
        parse_flags(["--lr", "--bf16"])
    with pytest.raises(ConfigError, match="flag --num-layers.*whole number"):
        load_config("tiny", parse_flags(["--num-layers", "x"])[0])


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_complete_and_fit_eight_ranks(name: str) -> None:
    cfg = load_config(name)
    assert check(cfg, 8) == 8 // cfg.parallel.tensor_model_parallel_size
    assert cfg.data.sources and cfg.curriculum.stages


@pytest.mark.parametrize(
    ("flags", "world", "numbers"),
    [
        ({"tensor_model_parallel_size": 3}, 3, ("(3)", "(8)", "nearest that works: 2")),
        (
            {"tensor_model_parallel_size": 6, "num_attention_heads": 12, "kv_channels": 16, "num_query_groups": 4},
            6,
            ("(6)", "num_query_groups (4)", "nearest that works: 4"),
        ),
        ({"tensor_model_parallel_size": 2, "tp_comm_overlap": True}, 2, ("sequence_parallel",)),
        (
            {"fp8_recipe": "tensorwise", "tensor_model_parallel_size": 2, "ffn_hidden_size": 400},
            2,
            ("ffn_hidden_size (400)", "200 on each of 2", "384 or 416"),
        ),
        ({"fp8_recipe": "tensorwise", "kv_channels": 9}, 1, ("kv_channels (9)", "72 on each of 1", "kv_channels 16")),
        (
            {
                "fp8_recipe": "tensorwise",
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "tp_comm_overlap": True,
            },
            2,
            ("fp8_recipe", "tp_comm_overlap"),
        ),
        ({"pipeline_model_parallel_size": 8}, 8, ("(8)", "(4)", "pipeline_model_parallel_size 4 would")),
        ({"pipeline_model_parallel_size": 4, "pipeline_schedule": "interleaved"}, 4, ("(4)", "(2)", "= 8", "_size 2 ")),
        ({"num_virtual_stages_per_pipeline_rank": 7}, 1, ("(7)", "(4)", "fewer chunks")),
        ({"num_virtual_stages_per_pipeline_rank": 0}, 1, ("(0)", "must be positive")),
        ({"num_virtual_stages_per_pipeline_rank": 2, "pipeline_schedule": "1f1b"}, 1, ("(2)", "1 for", "interleaved")),
        ({"num_virtual_stages_per_pipeline_rank": 3, "pipeline_schedule": "zb-v"}, 1, ("(3)", "2 for pipeline_sch")),
        ({"num_virtual_stages_per_pipeline_rank": 1, "pipeline_schedule": "zb-v"}, 1, ("(1)", "2 for", "1f1b takes 1")),
        ({"tensor_model_parallel_size": 2}, 3, ("= 2", "(3)", "start 2 or 4 ranks")),
        ({"num_attention_heads": 7}, 1, ("(7)", "(256)")),
        ({"num_query_groups": 3}, 1, ("(3)", "(8)")),
        ({"global_batch_size": 7}, 2, ("(7)", "= 2", "6 or 8")),
        ({"global_batch_size": 10**12}, 1, ("1000000000000", "1,048,576")),
        ({"num_layers": 10**11}, 1, ("100000000000", "1,024")),
        ({"context_parallel_size": 10**20}, 10**20, ("1" + 20 * "0", "context_parallel_size 64")),
        ({"sequence_parallel": True}, 1, ("1",)),
        ({"pipeline_layer_split": [3, 2], "pipeline_model_parallel_size": 2}, 2, ("[3, 2]", "(4), not 5")),
        ({"pipeline_layer_split": [2, 0, 2], "pipeline_model_parallel_size": 3}, 3, ("[2, 0, 2]", "may have none")),
        (
            {"pipeline_layer_split": [2, 2], "pipeline_schedule": "zb-v", "pipeline_model_parallel_size": 2},
            2,
            ("4 stag",),
        ),
        ({"pipeline_vocab_parallel": True, "pipeline_schedule": "zb-v"}, 1, ("leave out pipeline_schedule zb-v",)),
        (
            {"pipeline_vocab_parallel": True, "num_virtual_stages_per_pipeline_rank": 2},
            1,
            ("leave out num_virtual_stages_per_pipeline_rank 2",),
        ),
        ({"max_position_embeddings": 64}, 1, ("(64)", "(128)")),
        ({"num_distributed_optimizer_instances": 3}, 4, ("(3)", "4 replicas", "2 does")),
        (
            {"num_distributed_optimizer_instances": 4, "tensor_model_parallel_size": 4},
            8,
            ("(4)", "2 replicas", "2 does"),
        ),
        ({"num_distributed_optimizer_instances": 0}, 4, ("(0)",)),
        ({"ddp_bucket_size": 0}, 1, ("(0)",)),
        ({"check_weight_hash_across_dp_replicas_interval": -1}, 1, ("(-1)",)),
        ({"lr": -1.0}, 1, ("-1.0",)),
        ({"max_position_embeddings": 10**13}, 1, ("(10000000000000)", "16,777,216")),
        ({"kv_channels": 10**12}, 1, ("(1000000000000)", "16,777,216")),
        ({"rotary_percent": 0.1, "position_embedding_type": "rope"}, 1, ("(0.1)", "(32)")),
    ],
)
def test_conflicts_give_both_numbers(flags: dict, world: int, numbers: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(load_config("tiny", flags), world)
    for number in numbers:
        assert number in str(caught.value)


def test_what_schedules_and_chunks_default_to() -> None:
    def both(**flags: Any) -> tuple[str, int]:
        cfg = load_config("tiny", flags)
        check(cfg, 2)
        return cfg.parallel.schedule, cfg.parallel.chunks

    assert both() == ("1f1b", 1)
    assert both(num_virtual_stages_per_pipeline_rank=3) == ("interleaved", 3)
    assert both(pipeline_schedule="interleaved", pipeline_model_parallel_size=2) == ("interleaved", 2)
    assert both(pipeline_schedule="interleaved", num_virtual_stages_per_pipeline_rank=1) == ("interleaved", 1)
    assert both(pipeline_schedule="zb-v", pipeline_model_parallel_size=2) == ("zb-v", 2)
    assert both(pipeline_schedule="zb-h1", pipeline_layer_split=[0, 4], pipeline_model_parallel_size=2) == ("zb-h1", 1)


def test_padded_vocabulary() -> None:
    # The checklist's cases: 46,336 and 30,003 entries.
    assert [padded_vocab_size(46336, 128, tp) for tp in (1, 8)] == [46336, 47104]
    assert [padded_vocab_size(30003, 128, tp) for tp in (1, 8)] == [30080, 30720]


def test_a_preset_finds_its_data_under_data_root(tmp_path: Path) -> None:
    cfg = load_config("tiny", {"data_root": str(tmp_path)})
    assert cfg.data.sources[1].paths == [os.path.join(tmp_path, "zh_text_document")]
    assert cfg.tokenizer.tokenizer_model == os.path.join(tmp_path, "tokenizer.model")


def test_what_is_no_choice_is_quoted_in_part() -> None:
    with pytest.raises(ConfigError, match=r"must be one of .*, not 'a{60}'$"):
        load_config("tiny", {"lr_decay_style": "a" * 10**6})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run-dir", ""], "flag --run-dir needs a value"),
        (["--save-copy="], "flag --save-copy needs a value"),
        (["--load", " "], "flag --load needs a value"),
        (["--save-steps", ""], "flag --save-steps needs a value"),
        (["--save-steps", "3,1,"], "flag --save-steps needs a value, not '3,1,': one is empty"),
        (["--save-interval="], "flag --save-interval needs a value"),
    ],
)
def test_an_empty_value_is_none(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_flags(words)


def test_an_empty_name_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("logging: {run_dir: ''}\n")
    with pytest.raises(ConfigError, match=r"run_dir must not be empty"):
        load_config(str(tmp_path / "a.yaml"), {})
