"""A checkpoint whose bytes are not what was written is noticed, named in a line, and an older one taken for it."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from tiny_runs import reseal, run_to_end, tiny_config, tiny_prepared

from megapoly.checkpoint.folders import find_folders
from megapoly.checkpoint.load import CheckpointReader, check_same_model, find_checkpoint, load_checkpoint
from megapoly.checkpoint.report import verify
from megapoly.errors import CheckpointError, DamageError, MegapolyError
from megapoly.model.count import parameter_shapes
from megapoly.parallel.mesh import Mesh, single_process_mesh
from megapoly.sections import Config
from megapoly.train.loop import train
from megapoly.train.prepare import with_start
from megapoly.train.setup import build_run
from megapoly.train.start import load_start


def load_into_new(mesh: Mesh, cfg: Config) -> None:
    load_checkpoint(CheckpointReader.open(cfg.logging.run_dir), build_run(tiny_prepared(cfg), mesh).optimizer)


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """A run of three steps with a checkpoint of each."""
    cfg = tiny_config(tmp_path, "gpt2", 3, save_interval=1)
    run_to_end(single_process_mesh(), cfg)
    return cfg


def steps(cfg: Config) -> list[str]:
    return [folder.name for folder in find_folders(cfg.logging.run_dir)]


@pytest.mark.parametrize("damage", ["truncate", "remove", "path", "not json", "other model", "pointer", "old format"])
def test_a_damaged_checkpoint_gives_one_clear_line(damage: str, cfg: Config, tmp_path: Path) -> None:
    folder = find_checkpoint(tmp_path / "run")
    shard, metadata = folder / "shard_00000.safetensors", folder / "metadata.json"
    tree = json.loads(metadata.read_text())
    named = folder
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "remove":
        shard.unlink()
    elif damage == "path":
        tree["tensors"]["model.final_norm.weight"]["chunks"][0][2] = "../../etc/passwd"
        reseal(folder, tree)
    elif damage == "other model":
        cfg = tiny_config(tmp_path, "gpt2", 3, hidden_size=72)
    elif damage == "not json":
        metadata.write_text("{")
    elif damage == "pointer":
        named = folder.parent / "latest"
        named.write_text("../../../etc")
    elif damage == "old format":
        metadata.write_text(json.dumps(tree | {"format": "megapoly-checkpoint-1"}))
    with pytest.raises(MegapolyError) as caught:
        reader = CheckpointReader.open(tmp_path / "run")
        check_same_model(reader, cfg.model, 1003, parameter_shapes(cfg.model, 1003))
        load_into_new(single_process_mesh(), cfg)
    assert str(named) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_byte_can_change_unnoticed(cfg: Config, data: st.DataObject) -> None:
    folder = find_checkpoint(cfg.logging.run_dir)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = path.read_bytes()
    # Half of the draws fall into the first kilobytes, where a shard has its header.
    at = data.draw(st.integers(0, min(len(content), 4000) - 1) | st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    assert verify(folder) == []
    path.write_bytes(changed)
    try:
        problems = verify(folder)
        assert problems and all(str(folder) in problem for problem in problems)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("at", [3, 20])
def test_a_changed_byte_of_a_header_is_noticed_by_a_resume(at: int, cfg: Config) -> None:
    """Though it needs none: whoever opens the shard elsewhere does."""
    shard = find_checkpoint(cfg.logging.run_dir) / "shard_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[at] ^= 16
    shard.write_bytes(content)
    with pytest.raises(DamageError, match=f"{shard}: the checksum of its header does not fit"):
        load_into_new(single_process_mesh(), cfg)


@pytest.mark.parametrize("kind", ["model", "exp_avg", "exp_avg_sq"])
def test_a_changed_byte_of_a_tensor_is_noticed_by_whoever_reads_it(kind: str, cfg: Config) -> None:
    reader = CheckpointReader.open(cfg.logging.run_dir)
    chunk = reader.records[f"{kind}.final_norm.weight"].chunks[0]
    shard = reader.folder / chunk.file
    content = bytearray(shard.read_bytes())
    content[chunk.begin + 3] ^= 16
    shard.write_bytes(content)
    message = rf"{shard}: the checksum of '{kind}.final_norm.weight' at \(0,\) does not fit"
    with pytest.raises(DamageError, match=message):
        load_into_new(single_process_mesh(), cfg)
    if kind != "model":
        reader.get("final_norm.weight")  # an export reads no moments
        return
    with pytest.raises(DamageError, match=message):
        reader.get("final_norm.weight")


def test_a_changed_state_is_noticed(cfg: Config) -> None:
    path = find_checkpoint(cfg.logging.run_dir) / "state.json"
    path.write_text(path.read_text().replace('"samples": 24', '"samples": 16'))
    with pytest.raises(DamageError, match=f"{path}: its checksum does not fit"):
        CheckpointReader.open(cfg.logging.run_dir)


def start(mesh: Mesh, cfg: Config) -> int:
    """The step from which a run goes on."""
    return load_start(build_run(with_start(tiny_prepared(cfg), {}), mesh)).prepared.start_step


def complaint(mesh: Mesh, cfg: Config) -> str:
    try:
        return str(start(mesh, cfg))
    except MegapolyError as error:
        return f"{type(error).__name__}: {error}"


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def test_the_newest_sound_checkpoint_is_taken(tmp_path: Path) -> None:
    """Damage in the JSON is found by all ranks at once, that of a shard by the one that reads it."""
    ranks = {"tp": 2, "dp": 2}
    cfg = tiny_config(tmp_path, "gpt2", 4, save_interval=1, tensor_model_parallel_size=2)
    run_ranks(run_to_end, cfg, **ranks)
    root = tmp_path / "run/checkpoints"
    assert run_ranks(start, cfg, **ranks) == [4] * 4
    (root / "step_00000004/metadata.json").unlink()
    assert run_ranks(start, cfg, **ranks) == [3] * 4
    damaged(root / "step_00000003/shard_00003.safetensors")
    assert run_ranks(start, cfg, **ranks) == [2] * 4
    damaged(root / "step_00000002/shard_00001.safetensors")
    assert run_ranks(start, cfg, **ranks) == [1] * 4
    damaged(root / "step_00000001/state.json")
    found = run_ranks(complaint, cfg, **ranks)
    assert "no checkpoint is whole: " in found[0] and found[0].count("step_0000000") == 4, found[0]
    assert "metadata.json: missing" in found[0] and "shard_00003.safetensors: the checksum" in found[0]
    assert found[1:] == ["Echo: the main rank says which checkpoints are damaged"] * 3


def test_what_was_skipped_is_said_and_trained_over(
    cfg: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = run_to_end(single_process_mesh(), tiny_config(tmp_path, "gpt2", 3, run_dir=str(tmp_path / "other")))
    newest = find_checkpoint(cfg.logging.run_dir)
    damaged(newest / "shard_00000.safetensors")
    capfd.readouterr()
    found = run_to_end(single_process_mesh(), cfg)
    said = capfd.readouterr().out
    assert f"warning: {newest} is damaged and was skipped: {newest / 'shard_00000.safetensors'}: the checksum" in said
    assert "resuming" in said and "from step 2" not in said and "at step 2/3" in said
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert verify(newest) == []


def test_a_second_directory_stands_in(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "gpt2", 2, save_interval=1, save_copy=str(tmp_path / "copy"))
    run_to_end(single_process_mesh(), cfg)
    first, second = (tmp_path / place / "step_00000002" for place in ("run/checkpoints", "copy"))
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
    assert all((second / path.name).read_bytes() == path.read_bytes() for path in first.iterdir())
    damaged(first / "shard_00000.safetensors")
    started = load_start(build_run(with_start(tiny_prepared(cfg), {}), single_process_mesh())).prepared
    assert started.checkpoint is not None and started.checkpoint.folder == second
    for path in (tmp_path / "run/checkpoints").rglob("*.*"):
        path.unlink()
    assert start(single_process_mesh(), cfg) == 2


def test_a_folder_given_by_name_has_no_stand_in(cfg: Config, tmp_path: Path) -> None:
    root = tmp_path / "run/checkpoints"
    damaged(root / "step_00000002/shard_00000.safetensors")
    other = {"run_dir": str(tmp_path / "other")}
    named = tiny_config(tmp_path, "gpt2", 3, load=str(root / "step_00000002"), **other)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step_00000002/shard"):
        train(build_run(with_start(tiny_prepared(named), {}), single_process_mesh()))
    train(build_run(with_start(tiny_prepared(tiny_config(tmp_path, "gpt2", 3, load=str(root), **other)), {}),
                    single_process_mesh()))  # fmt: skip


def one_tensor(shape: list[int], *chunks: tuple[list[int], list[int]], dtype: str = "float32", begin: int = 0) -> dict:
    named = [[offsets, sizes, "shard_00000.safetensors", begin, 1] for offsets, sizes in chunks]
    return {"tensors": {"model.final_norm.weight": {"dtype": dtype, "shape": shape, "chunks": named}}}


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("state.json", {"config": {"model": []}}, "holds no keys"),
        ("state.json", {"config": {"model": {"num_attention_heads": 0}}}, "must be positive"),
        ("state.json", {"config": {"model": {"num_layer": 3}}}, "unknown key"),
        ("state.json", {"step": -1}, "'step'"),
        ("state.json", {"samples": "8"}, "'samples'"),
        ("metadata.json", one_tensor([10**13], ([0], [10**13])), "are no chunk's"),
        ("metadata.json", one_tensor([4], ([0], [4])), "bytes 0 to 16"),
        ("metadata.json", one_tensor([4], ([0], [4]), begin=10**6), "of shard_00000.safetensors, it has"),
        ("metadata.json", one_tensor([4], ([0], [2]), ([1], [2])), "overlap"),
        ("metadata.json", one_tensor([4], ([0], [4, 1])), "has not the dimensions"),
        ("metadata.json", one_tensor([4], ([0], [2])), "chunks hold 2 entries"),
        ("metadata.json", one_tensor([4], ([2], [4])), "outside"),
        ("metadata.json", one_tensor([4], ([0], [4]), dtype="object"), "'object'"),
        ("metadata.json", {"files": {"../x": [1, 1, 1]}, "tensors": {}}, "no file's name"),
        ("metadata.json", {"files": 3}, "not of the kind"),
        ("metadata.json", {"files": {}}, "shard_00000.safetensors holds chunks and is not among the files"),
        ("metadata.json", {"tensors": {"x": {}}}, "tensor 'x': entry 'shape' is missing"),
        ("metadata.json", {"tensors": {"x": {"shape": [1], "dtype": [], "chunks": []}}}, "is not float32"),
        ("metadata.json", {"tensors": {"x": {"shape": [1], "dtype": "float32", "chunks": [3]}}}, "3 is no chunk"),
        ("metadata.json", {"format": "megapoly-checkpoint-9"}, "is of format 'megapoly-checkpoint-9', this version"),
        ("state.json", {"dtype": []}, "'dtype' is \\[\\], not a text"),
        ("state.json", {"dtype": {}}, "'dtype'"),
        ("state.json", {"lr_decay_iters": [[[]]]}, "'lr_decay_iters' is"),
        ("state.json", {"dtype": "int"}, "'dtype'"),
    ],
)
def test_doctored_json_gives_one_clear_line(file: str, change: dict, reason: str, cfg: Config) -> None:
    folder = find_checkpoint(cfg.logging.run_dir)
    path = folder / file
    if file == "state.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    reseal(folder, change if file == "metadata.json" else None)
    with pytest.raises(CheckpointError, match=reason) as caught:
        CheckpointReader.open(cfg.logging.run_dir)
    assert not isinstance(caught.value, DamageError)  # nothing that an older checkpoint would mend
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
