"""Weights in and out: both layouts, four kinds, damaged files, bounded memory (T10)."""

import json
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from hadal.checkpoint import CheckpointSource, convert, load, make_random, meta_model, save
from hadal.checkpoint import tensor_specs as specs_of
from hadal.checkpoint.names import expert_stack, to_official, to_transformers
from hadal.config import ModelConfig
from hadal.errors import CheckpointError, CheckpointMismatchError, InputError
from hadal.model import Precision, Transformer, logits, quant, randomize
from hadal.model.kernels import without_kernels
from tests.configs import CONFIGS, schedule

FLASH_LIKE = CONFIGS["flash_like"]
KINDS = {
    "instruct": schedule(0, 4, 128, num_hash_layers=1).quantized("instruct"),
    "base": schedule(0, 4, 128, num_hash_layers=1).quantized("base"),
    "plain": schedule(0, 4, 128, num_hash_layers=1),
}


def same_tensors(first, second):
    with CheckpointSource.open(first) as a, CheckpointSource.open(second) as b:
        assert a.specs == b.specs
        for name in a.specs:
            left, right = (s.read(name).contiguous() for s in (a, b))
            assert torch.equal(left.view(torch.uint8), right.view(torch.uint8)), name


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    for kind, config in KINDS.items():
        make_random(config, folder / kind, seed=3)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_official_to_huggingface_and_back_is_bit_exact(kind, kinds, tmp_path):
    convert(kinds / kind, tmp_path / "hf", layout="huggingface", max_shard_bytes=50_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    convert(tmp_path / "hf", tmp_path / "back", layout="official")
    same_tensors(kinds / kind, tmp_path / "back")
    same_tensors(kinds / kind, tmp_path / "hf")


@pytest.mark.parametrize("kind", KINDS)
def test_stored_and_plain_models_compute_the_same(kind, kinds):
    """Dequantising at every use or once at loading: the same bits."""
    ids = torch.randint(0, 512, (150,))
    stored = load(kinds / kind, dtype=torch.float32)
    plain = load(kinds / kind, dtype=torch.float32, storage="plain")
    with without_kernels():
        assert torch.equal(logits(stored, [ids])[0], logits(plain, [ids])[0])


@pytest.mark.parametrize("kind", ["instruct", "base"])
def test_save_of_a_loaded_model_is_bit_exact(kind, kinds, tmp_path):
    save(load(kinds / kind), tmp_path / "again")
    same_tensors(kinds / kind, tmp_path / "again")


def test_kind_is_read_from_the_tensors(kinds, tmp_path):
    """T10b, c: config.json may not say; the stored dtypes do."""
    for kind, scale in (("instruct", "ue8m0"), ("base", "float32")):
        target = tmp_path / kind
        convert(kinds / kind, target, layout="official")
        raw = json.loads((target / "config.json").read_text())
        del raw["expert_dtype"]
        (target / "config.json").write_text(json.dumps(raw))
        config = load(target).config
        assert config.expert_dtype == {"instruct": "fp4", "base": "fp8"}[kind]
        assert config.quantization_config.scale_dtype == scale


def test_default_precision_follows_the_checkpoint(kinds):
    assert load(kinds / "instruct").precision == Precision.published()
    assert load(kinds / "plain").precision == Precision.exact()


def test_quantising_on_save_equals_fake_quantisation(tmp_path):
    """FP4 training sees exactly what will be stored (7.2)."""
    model = Transformer(KINDS["plain"])
    randomize(model, 5)
    save(model, tmp_path / "q", config=KINDS["instruct"], dtype=torch.float32)
    switches = Precision(expert_weights_fp4=True, linear_weights_fp8=True)
    faked = Transformer(KINDS["plain"], precision=switches)
    faked.load_state_dict(model.state_dict())
    stored = load(tmp_path / "q", dtype=torch.float32, precision=Precision.exact())
    ids = torch.randint(0, 512, (100,))
    with without_kernels():
        assert torch.equal(logits(faked, [ids])[0], logits(stored, [ids])[0])


def test_fp4_converts_to_fp8_without_loss(kinds, tmp_path):
    """The published converter's way: Flash's experts for hardware without FP4."""
    name = "layers.1.ffn.experts.3.w2"
    convert(kinds / "instruct", tmp_path / "eight", layout="official", weights="base")
    with (
        CheckpointSource.open(kinds / "instruct") as four,
        CheckpointSource.open(tmp_path / "eight") as eight,
    ):
        exact = quant.dequantize_fp4(four.read(f"{name}.weight"), four.read(f"{name}.scale"))
        assert eight.specs[f"{name}.weight"].dtype == torch.float8_e4m3fn
        found = quant.dequantize_fp8(eight.read(f"{name}.weight"), eight.read(f"{name}.scale"))
        assert torch.equal(found, exact)


@pytest.fixture
def edited(kinds, tmp_path):
    """Return a function that copies a checkpoint with some tensors changed."""

    def edit(kind, change):
        convert(kinds / kind, tmp_path / "edited", layout="official")
        (file,) = (tmp_path / "edited").glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, file)
        return tmp_path / "edited"

    return edit


def test_dense_matrices_keep_their_codes(kinds, tmp_path):
    """Between UE8M0 and float32 scales only the spelling changes; the matrices do not."""
    convert(kinds / "instruct", tmp_path / "base", layout="official", weights="base")
    convert(tmp_path / "base", tmp_path / "again", layout="official", weights="base")
    same_tensors(tmp_path / "base", tmp_path / "again")
    with (
        CheckpointSource.open(kinds / "instruct") as before,
        CheckpointSource.open(tmp_path / "base") as after,
    ):
        for name in ("layers.0.attn.wq_a", "layers.1.attn.wo_b", "mtp.0.e_proj"):
            left, right = (s.read(f"{name}.weight") for s in (before, after))
            assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))
            powers = quant.decode_ue8m0(before.read(f"{name}.scale"))
            assert torch.equal(powers, after.read(f"{name}.scale"))


def test_mixed_scales_keep_their_codes(edited, kinds):
    """A Base checkpoint in which some matrices have UE8M0 scales (T10c)."""

    def change(tensors):
        name = "layers.1.attn.wq_b"
        matrix = torch.randn(tensors[f"{name}.weight"].shape) * 0.1
        tensors[f"{name}.weight"], tensors[f"{name}.scale"] = quant.quantize_fp8(matrix)

    path = edited("base", change)
    with CheckpointSource.open(path) as source:
        held = [source.read(f"layers.1.attn.wq_b.{leaf}") for leaf in ("weight", "scale")]
        expected = quant.dequantize_fp8(*held)
    loaded = load(path).blocks[1].attn.wq_b
    assert torch.equal(loaded.dense_weight(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32])
@pytest.mark.parametrize("storage", ["checkpoint", "plain"])
def test_scales_of_another_dtype_are_refused(edited, dtype, storage):
    """T10a: their bytes are no exponents."""

    def change(tensors):
        name = "layers.1.attn.wq_b.scale"
        tensors[name] = quant.decode_ue8m0(tensors[name]).to(dtype)

    with pytest.raises(CheckpointMismatchError, match=r"layers\.1\.attn\.wq_b"):
        load(edited("instruct", change), storage=storage)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_integers_are_no_weights(edited, dtype):
    path = edited("plain", lambda t: t.update({"norm.weight": t["norm.weight"].to(dtype)}))
    with pytest.raises(CheckpointMismatchError, match=r"norm\.weight: expected float32"):
        load(path)


def test_hash_tables_are_checked(edited):
    """T13: they index experts without further checks."""
    name = "layers.0.ffn.gate.tid2eid"
    path = edited("plain", lambda t: t.update({name: torch.full_like(t[name], 99)}))
    with pytest.raises(CheckpointError, match=r"expected experts 0\.\.7, got 99\.\.99"):
        load(path)


def test_config_that_contradicts_the_tensors(kinds, tmp_path):
    """T10b: neither is believed over the other."""
    convert(kinds / "base", tmp_path / "x", layout="official")
    file = tmp_path / "x" / "config.json"
    raw = json.loads(file.read_text())
    for change in ({"expert_dtype": "fp4"}, {"quantization_config": None}):
        file.write_text(json.dumps(raw | change))
        with pytest.raises(CheckpointError, match="but the stored ones are fp8"):
            load(tmp_path / "x")


def test_save_refuses_another_network(tmp_path):
    model = Transformer(KINDS["plain"])
    with pytest.raises(CheckpointMismatchError):
        save(model, tmp_path / "x", config=CONFIGS["odd"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_dtype_round_trips(dtype, tmp_path):
    model = Transformer(KINDS["plain"], dtype=dtype)
    save(model, tmp_path / "x")
    again = load(tmp_path / "x")
    assert again.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_stray_copy_without_an_index(kinds, tmp_path):
    """Which of two files wins must not depend on their names."""
    convert(kinds / "plain", tmp_path / "x", layout="official")
    (file,) = (tmp_path / "x").glob("*.safetensors")
    (tmp_path / "x" / "z-copy.safetensors").write_bytes(file.read_bytes())
    (tmp_path / "x" / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="both hold"):
        load(tmp_path / "x")


def test_draft_modules_can_be_left_out_of_a_conversion(kinds, tmp_path):
    convert(kinds / "plain", tmp_path / "x", layout="official", mtp=False)
    assert not any(n.startswith("mtp.") for n in CheckpointSource.open(tmp_path / "x").specs)
    assert len(load(tmp_path / "x").mtp) == 0


def test_all_problems_are_listed_at_once(kinds, tmp_path):
    convert(kinds / "plain", tmp_path / "x", layout="official")
    (file,) = (tmp_path / "x").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["norm.weight"], tensors["layers.1.attn.indexer.wq_b.weight"]
    tensors["layers.9.attn.wkv.weight"] = torch.zeros(3)
    tensors["head.weight"] = torch.zeros(5, 5)
    tensors["layers.0.ffn.gate.tid2eid"] = torch.zeros(512, 3)
    save_file(tensors, file)
    (tmp_path / "x" / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointMismatchError) as caught:
        load(tmp_path / "x")
    error = caught.value
    assert set(error.missing) == {"norm.weight", "layers.1.attn.indexer.wq_b.weight"}
    assert error.unexpected == ("layers.9.attn.wkv.weight",)
    assert len(error.mismatched) == 2
    assert "expected float32 [512, 64], got float32 [5, 5]" in str(error)


def test_missing_scale_is_noticed(kinds, tmp_path):
    convert(kinds / "instruct", tmp_path / "x", layout="official")
    (file,) = (tmp_path / "x").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["layers.0.attn.wkv.scale"]
    save_file(tensors, file)
    (tmp_path / "x" / "model.safetensors.index.json").unlink()
    for storage in ("checkpoint", "plain"):
        with pytest.raises(CheckpointMismatchError, match=r"layers\.0\.attn\.wkv\.(scale|weight)"):
            load(tmp_path / "x", storage=storage)


@pytest.mark.parametrize("storage", ["checkpoint", "plain"])
def test_scale_of_another_shape_is_noticed(storage, kinds, tmp_path):
    convert(kinds / "instruct", tmp_path / "x", layout="official")
    (file,) = (tmp_path / "x").glob("*.safetensors")
    tensors = load_file(file)
    tensors["layers.0.attn.wq_b.scale"] = tensors["layers.0.attn.wq_b.scale"].T.repeat(3, 1)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file)
    with pytest.raises(CheckpointMismatchError, match=r"layers\.0\.attn\.wq_b"):
        load(tmp_path / "x", storage=storage)


def test_without_mtp(kinds):
    model = load(kinds / "plain", mtp=False)
    assert len(model.mtp) == 0
    whole = load(kinds / "plain")
    ids = torch.randint(0, 512, (30,))
    assert torch.equal(logits(model, [ids])[0], logits(whole, [ids])[0])


class TestDamage:
    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            load(tmp_path / "nowhere")

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated_file(self, keep, kinds, tmp_path):
        convert(kinds / "plain", tmp_path / "x", layout="official")
        (file,) = (tmp_path / "x").glob("*.safetensors")
        data = file.read_bytes()
        file.write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match="cannot read"):
            load(tmp_path / "x")

    def test_missing_shard_and_broken_index(self, kinds, tmp_path):
        convert(kinds / "plain", tmp_path / "x", layout="official", max_shard_bytes=200_000)
        files = sorted((tmp_path / "x").glob("*.safetensors"))
        assert len(files) > 1
        files[1].unlink()
        with pytest.raises(CheckpointError, match="missing or cut short"):
            load(tmp_path / "x")
        (tmp_path / "x" / "model.safetensors.index.json").write_text("[]")
        with pytest.raises(CheckpointError, match="not a safetensors index"):
            load(tmp_path / "x")

    def test_index_that_disagrees(self, kinds, tmp_path):
        convert(kinds / "plain", tmp_path / "x", layout="official")
        index = tmp_path / "x" / "model.safetensors.index.json"
        value = json.loads(index.read_text())
        value["weight_map"]["ghost"] = value["weight_map"]["norm.weight"]
        index.write_text(json.dumps(value))
        with pytest.raises(CheckpointError, match="its index disagree"):
            load(tmp_path / "x")

    def test_index_that_points_elsewhere(self, kinds, tmp_path):
        convert(kinds / "plain", tmp_path / "x", layout="official")
        index = tmp_path / "x" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"norm.weight": "../kinds/secret"}}))
        with pytest.raises(CheckpointError, match="outside its folder"):
            load(tmp_path / "x")

    def test_two_writers_of_one_target(self, kinds, tmp_path):
        """One wins, the other is told; neither's cleaning up touches the other's work."""
        outcomes = []

        def write():
            try:
                convert(kinds / "plain", tmp_path / "x", layout="official")
                outcomes.append("written")
            except CheckpointError as err:
                outcomes.append(str(err))

        threads = [threading.Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count("written") == 1
        same_tensors(kinds / "plain", tmp_path / "x")
        assert [p.name for p in tmp_path.iterdir()] == ["x"]

    def test_odd_targets(self, kinds, tmp_path, monkeypatch):
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        (tmp_path / "link").symlink_to(tmp_path / "empty")
        convert(kinds / "plain", tmp_path / "link", layout="official")
        same_tensors(kinds / "plain", tmp_path / "empty")
        with pytest.raises(InputError, match="max_shard_bytes"):
            convert(kinds / "plain", tmp_path / "y", layout="official", max_shard_bytes=-3)

    def test_stack_that_unrolls_for_ever(self, kinds, tmp_path):
        convert(kinds / "plain", tmp_path / "x", layout="official")
        save_file(
            {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2_000_000, 0, 4)},
            tmp_path / "x" / "z.safetensors",
        )
        (tmp_path / "x" / "model.safetensors.index.json").unlink()
        with pytest.raises(CheckpointError, match="not a stack of experts"):
            load(tmp_path / "x")

    def test_target_exists(self, kinds, tmp_path):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "precious").touch()
        with pytest.raises(CheckpointError, match="not an empty folder"):
            convert(kinds / "plain", tmp_path / "x", layout="official")
        assert (tmp_path / "x" / "precious").exists()

    def test_failed_write_leaves_nothing(self, kinds, tmp_path):
        """A full disk, simulated by a limit on the size of a file."""
        code = textwrap.dedent(f"""
            import resource, signal
            from hadal.checkpoint import convert
            from hadal.errors import CheckpointError
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                convert({str(kinds / "plain")!r}, {str(tmp_path / "x")!r}, layout="official")
            except CheckpointError as err:
                print(err)
        """)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "cannot write" in result.stdout, result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_killed_write_leaves_no_checkpoint(self, kinds, tmp_path):
        """kill -9 in the middle: the target does not exist, and the work can be repeated."""
        code = textwrap.dedent(f"""
            import os, signal
            from hadal.checkpoint import convert
            def die(done, total):
                if done > total / 2:
                    os.kill(os.getpid(), signal.SIGKILL)
            convert({str(kinds / "plain")!r}, {str(tmp_path / "x")!r}, layout="official",
                    progress=die)
        """)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True)
        assert result.returncode == -signal.SIGKILL
        assert not (tmp_path / "x").exists()
        convert(kinds / "plain", tmp_path / "x", layout="official")
        same_tensors(kinds / "plain", tmp_path / "x")


class TestNames:
    def test_every_name_survives_the_other_dialect(self):
        for config in (ModelConfig.nano().quantized("instruct"), CONFIGS["pro_like"]):
            names = [n for n in specs_of(config) if expert_stack(n) is None]
            translated = [to_transformers(n) for n in names]
            assert len(set(translated)) == len(names)
            assert [to_official(n) for n in translated] == names
            assert [to_official(n) for n in names] == names

    def test_experts_are_stacked(self):
        name = "layers.3.ffn.experts.7.w3.scale"
        assert expert_stack(name) == "model.layers.3.mlp.experts.gate_up_proj_scale_inv"
        assert expert_stack("mtp.0.ffn.experts.7.w3.scale") is None


class TestFullSize:
    """Counts and bytes of the published checkpoints, from the modules on the meta device."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "num_tensors", "num_bytes"),
        [
            ("v4_flash", 69_187, 159_609_485_896),
            ("v4_pro", 145_116, 864_704_792_696),
            ("v4_flash_base", 69_187, 292_555_345_480),
            ("v4_pro_base", 145_116, 1_602_325_824_632),
        ],
    )
    def test_tensors_and_bytes(self, name, num_tensors, num_bytes):
        specs = specs_of(getattr(ModelConfig, name)())
        assert len(specs) == num_tensors
        assert sum(s.num_bytes for s in specs.values()) == num_bytes

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "total", "active"),
        [("v4_flash", "284.33", "13.27"), ("v4_pro", "1573.00", "48.85")],
    )
    def test_parameters(self, name, total, active):
        config = getattr(ModelConfig, name)()
        model = meta_model(config.plain())
        main = {n: p.numel() for n, p in model.named_parameters() if not n.startswith("mtp.")}
        assert f"{sum(main.values()) / 1e9:.2f}" == total
        share = config.num_experts_per_tok / config.n_routed_experts
        used = sum(
            size * (share if ".ffn.experts." in n else 1)
            for n, size in main.items()
            if n != "embed.weight"
        )
        assert f"{used / 1e9:.2f}" == active


def test_loading_maps_and_converting_streams(tmp_path):
    """Peak memory: a view of the file when loading, one entry at a time when converting."""
    config = schedule(
        0, 0, 0, 0, vocab_size=4096, hidden_size=512, n_routed_experts=32, moe_intermediate_size=512
    )
    model = Transformer(config)
    save(model, tmp_path / "big")
    size = sum(f.stat().st_size for f in (tmp_path / "big").iterdir())
    assert size > 400e6
    del model
    peaks = {}
    for what, call in {
        "import": "pass",
        "load": f"load({str(tmp_path / 'big')!r})",
        "convert": f"convert({str(tmp_path / 'big')!r}, {str(tmp_path / 'hf')!r}, "
        "layout='huggingface')",
    }.items():
        code = (
            "from hadal.checkpoint import load, convert\n"
            "def anonymous():\n"
            "    rows = open('/proc/self/status').read().split()\n"
            "    return int(rows[rows.index('RssAnon:') + 1]) * 1024\n"
            "import threading\n"
            "peak, stop = [0], threading.Event()\n"
            "def watch():\n"
            "    while not stop.wait(0.002):\n"
            "        peak[0] = max(peak[0], anonymous())\n"
            "t = threading.Thread(target=watch); t.start()\n"
            f"{call}\nstop.set(); t.join(); print(max(peak[0], anonymous()))"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        peaks[what] = int(out.stdout)
    assert peaks["load"] - peaks["import"] < 0.1 * size
    assert peaks["convert"] - peaks["import"] < 0.1 * size
