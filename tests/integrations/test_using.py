"""What people do with a transformers model, done with a packed one: it works, or one sentence says why not.

P1 to P7 are the ways in which a quantizer of transformers can go wrong silently. P1 (not registered) is tested in
test_autoload.py, P3 (packed tensors missing) and P4 (types) in test_transformers.py, the others here.
"""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

import packing
import tiny
from mopeq.checkpoint import read_manifest, verify
from mopeq.errors import CheckpointError, InputError
from mopeq.integrations.transformers import MopeqHfQuantizer
from mopeq.kernels import selected
from mopeq.precision import FULL, Precision, PrecisionMap
from mopeq.runtime import packed_modules
from mopeq.runtime.install import install

IDS = torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD, "eos_token_id": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """Not to be written into."""
    out = tmp_path_factory.mktemp("using")
    packing.pack_model(tiny_model("mixtral"), out / "packed")
    packing.dequantized(tiny_model("mixtral"), out / "packed", out / "dense")
    return out


@pytest.fixture
def packed(folder: Path) -> Path:
    return folder / "packed"


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder / "packed", tmp_path / "packed"))


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder / "packed")


@pytest.fixture(scope="module")
def dense(folder: Path) -> Any:
    return load(folder / "dense")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


# --- loading ----------------------------------------------------------------------------------------------------------


LOADING = (
    {"device_map": "auto"},
    {"device_map": {"": "cpu"}},
    {"low_cpu_mem_usage": True},
    {"use_safetensors": True},
    {"experts_implementation": "batched_mm"},
)


@pytest.mark.parametrize("options", LOADING, ids=str)
def test_loading_options(options: dict[str, Any], packed: Path, model: Any) -> None:
    assert torch.equal(logits(load(packed, **options)), logits(model))


def test_too_little_memory_is_refused(packed: Path) -> None:
    with pytest.raises(InputError, match="device_map puts packed modules on disk"):
        load(packed, device_map="auto", max_memory={"cpu": 100_000})


def test_another_quantization_is_refused(packed: Path) -> None:
    from transformers import BitsAndBytesConfig

    with pytest.raises(ValueError, match="quantized with MopeqConfig but you are passing a BitsAndBytesConfig"):
        load(packed, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_p2_initialisation_passes_packed_modules_by(packed: Path) -> None:
    """transformers initialises by the class of the module, which still is an experts class, without its weights."""
    fresh = load(packed)
    before = logits(fresh)
    for buffer in fresh.buffers():
        buffer._is_hf_initialized = True
    for module in fresh.modules():
        fresh._initialize_weights(module)
    assert torch.equal(logits(fresh), before)


KEPT = (
    "model.layers.1.input_layernorm.weight",
    "model.layers.0.block_sparse_moe.gate.weight",
    "model.embed_tokens.weight",
)


@pytest.mark.parametrize("name", KEPT)
def test_p3_other_tensors_missing(name: str, changed: Path) -> None:
    """transformers would initialise them at random and only list them."""
    tiny.rewrite(changed, {name: None})
    with pytest.raises(CheckpointError, match=r"1 tensors are missing from the checkpoint, the first is model\."):
        load(changed)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing from the checkpoint, the first is "):
        AutoModel.from_pretrained(changed)


def test_p5_only_hooks_that_every_version_has() -> None:
    """Those whose signature or existence changed between 5.17 and today are left alone."""
    drifting = {
        "update_weight_conversions",
        "update_tp_plan",
        "update_ep_plan",
        "get_param_name",
        "update_parallel_plan",
    }
    assert not drifting & set(vars(MopeqHfQuantizer))


def test_p6_other_shapes(changed: Path) -> None:
    """5.17 and 5.19 compare no shapes in a quantized model."""
    name = "model.layers.0.input_layernorm.weight"
    tiny.rewrite(changed, {name: torch.ones(96), "model.norm.weight": torch.ones(32)})  # as many elements as before
    with pytest.raises(
        (CheckpointError, RuntimeError), match=r"\[96\]|size mismatch|mismatched sizes|ignore_mismatched"
    ):
        load(changed)


def test_new_head_on_packed_layers(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """A classifier's head is in no file; that is said by transformers and no fault of the files."""
    precisions = PrecisionMap.uniform({0: 4, 1: 4}, Precision(4, 32), rest={"lm_head": FULL})
    packing.pack_model(tiny_model("mixtral"), tmp_path / "packed", precisions)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed", num_labels=3)
    assert model(IDS).logits.shape == (2, 3)


# --- running ----------------------------------------------------------------------------------------------------------


def test_pipeline(packed: Path, dense: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packed)
    settings = {"max_new_tokens": 6, "do_sample": False}
    (got,) = pipeline("text-generation", model=str(packed), dtype=torch.float32)("def f(", **settings)
    (want,) = pipeline("text-generation", model=dense, tokenizer=tokenizer)("def f(", **settings)
    assert got == want


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False},
                                     {"num_return_sequences": 2, "num_beams": 2}], ids=str)  # fmt: skip
def test_generate(options: dict[str, Any], model: Any, dense: Any) -> None:
    settings = {**GREEDY, **options}
    assert model.generate(IDS, **settings).tolist() == dense.generate(IDS, **settings).tolist()


@pytest.mark.filterwarnings("ignore:Passing `generation_config` together")
def test_generate_with_an_assistant(model: Any, dense: Any) -> None:
    """Packed weights draft, full ones check."""
    got = dense.generate(IDS[:1], assistant_model=model, **GREEDY)
    assert got.tolist() == dense.generate(IDS[:1], **GREEDY).tolist()


def test_streamer(packed: Path, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packed)
    streamer = TextIteratorStreamer(tokenizer, timeout=60, skip_prompt=True)
    whole = model.generate(IDS[:1], streamer=streamer, **GREEDY)
    assert "".join(streamer) == tokenizer.decode(whole[0, IDS.shape[1] :])


def test_compile(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """One graph with the compiled kernel; with the other, graphs break at the experts and ``fullgraph`` is refused."""
    packing.pack_model(tiny_model("mixtral", num_hidden_layers=1), tmp_path / "packed")
    model = load(tmp_path / "packed")
    expected = logits(model)
    torch._dynamo.reset()
    assert torch.equal(logits(torch.compile(model, backend="eager")), expected)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    if selected().name == "cpu":
        assert torch.equal(logits(whole), expected)
    else:
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
            logits(whole)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.type(torch.bfloat16)]
)
def test_cast(move: Callable[[Any], Any], model: Any) -> None:
    """Packed buffers keep their types, also where transformers refuses the cast of a quantized model."""
    clone = copy.deepcopy(model)
    try:
        move(clone)
    except ValueError as error:
        assert "is not supported for quantized model" in str(error)  # noqa: PT017
    else:
        assert logits(clone).dtype == torch.bfloat16
    for module in packed_modules(clone).values():
        assert {b.dtype for b in module.buffers()} <= {torch.uint8, torch.float16}


def test_dequantize_and_resize_are_refused(packed: Path) -> None:
    fresh = load(packed)
    with pytest.raises(InputError, match="load the original"):
        fresh.dequantize()
    with pytest.raises(AttributeError, match=r"QLinear is packed and has no weight.*resizing the vocabulary"):
        fresh.resize_token_embeddings(300, mean_resizing=False)
    assert not hasattr(fresh.lm_head, "weight")
    with pytest.raises(AttributeError, match="has no attribute 'wait'"):
        fresh.lm_head.wait  # noqa: B018


# --- copying and saving -----------------------------------------------------------------------------------------------


def test_copies(model: Any, packed: Path, tmp_path: Path) -> None:
    """Deep copies, pickles and torch.save: equal, apart, and saved like the first."""
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    for number, clone in enumerate(copies):
        assert torch.equal(logits(clone), logits(model))
        assert {t.data_ptr() for t in clone.buffers()}.isdisjoint({t.data_ptr() for t in model.buffers()})
        clone.save_pretrained(tmp_path / str(number))
        assert verify(tmp_path / str(number), hashes=False) == read_manifest(packed)


def test_pickle_needs_no_import(model: Any, tmp_path: Path) -> None:
    experts = model.model.layers[0].mlp.experts
    (tmp_path / "experts").write_bytes(pickle.dumps(experts))
    code = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb'))).__name__)"
    said = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "experts"], check=True, capture_output=True, text=True
    )
    assert said.stdout.strip() == type(experts).__name__ == "MopeqMixtralExperts"


def test_state_dict(model: Any, packed: Path) -> None:
    other = load(packed)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    broken = model.state_dict()
    broken.pop("model.layers.0.mlp.experts.down_qweight")
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(broken)


def test_save_pretrained_keeps_what_loading_needs(model: Any, packed: Path, tmp_path: Path) -> None:
    """Tensors and configuration, with the precision map; no record in ``mopeq/``, no hashes: they would be others."""
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {n for n in names if not n.endswith(".safetensors")} == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }
    assert verify(tmp_path / "saved", hashes=False).precisions == read_manifest(packed).precisions
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_save_pretrained_over_the_folder(changed: Path) -> None:
    """Old hashes, and an index if there was one, stay and are of other files: verify says so, loading is right."""
    model = load(changed)
    before = logits(model)
    model.save_pretrained(changed)
    with pytest.raises(CheckpointError, match=r"hashes\.json"):
        verify(changed)
    assert torch.equal(logits(load(changed)), before)


def test_what_the_hub_gets_is_enough(packed: Path, tmp_path: Path) -> None:
    """The files that an upload takes, copied one by one, load as model and tokenizer."""
    from huggingface_hub.utils import filter_repo_objects

    there = [str(f.relative_to(packed)) for f in packed.rglob("*") if f.is_file()]
    taken = list(filter_repo_objects(there, ignore_patterns=[".git/*", ".cache/*", "**/.git/*"]))
    for name in taken:
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packed / name, tmp_path / "hub" / name)
    assert verify(tmp_path / "hub") == read_manifest(packed)
    assert torch.equal(logits(load(tmp_path / "hub")), logits(load(packed)))
    assert AutoTokenizer.from_pretrained(tmp_path / "hub")("ab")["input_ids"]


def test_p7_parts_and_models_packed_by_hand_are_not_saved(packed: Path, model: Any, tmp_path: Path) -> None:
    """They lack the conversions that from_pretrained leaves, and would be written under names that nothing reads."""
    by_hand = tiny.tiny_model("mixtral")
    install(by_hand, read_manifest(packed))
    for part in (by_hand, by_hand.model, model.model, copy.deepcopy(model).model):
        with pytest.raises(InputError, match="save_pretrained was asked of a part of a packed model"):
            part.save_pretrained(tmp_path / "part")
        assert not list(tmp_path.glob("part/*"))
