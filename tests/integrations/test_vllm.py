"""The vLLM plugin against the real vLLM (``make test-vllm``): the same tokens, and refusals."""

from __future__ import annotations

import base64
import gc
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed; make test-vllm installs it apart and runs this", allow_module_level=True)

import torch

from mopeq.adapters import describe, inventory_of
from mopeq.data.samples import bundled_model
from mopeq.load import load
from mopeq.precision import FULL, GROUPS, Precision, PrecisionMap
from mopeq.source import open_source
from packing import REST, dequantized, pack_model
from tiny import rewrite, save_tiny

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR",
    VLLM_WORKER_MULTIPROC_METHOD="spawn", OMP_NUM_THREADS="1",
)  # fmt: skip
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

PROMPTS = ([84, 104, 101, 32, 115, 101, 97], [5, 250, 77, 31, 9, 200, 13, 64, 64, 2, 180], [72, 105])
NEW = 24
SIZES: dict[str, dict[str, Any]] = {
    "olmoe": {},
    "mixtral": {"num_key_value_heads": 2},
    "qwen2_moe": {"shared_expert_intermediate_size": 128, "intermediate_size": 256, "num_key_value_heads": 4},
    "qwen3_moe": {"head_dim": 32},
    "deepseek_v2": {"kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32},
}
"""Attention on vLLM's CPU backend wants heads of 32 and more, and latent attention 512 + 64."""
KINDS = (FULL, *(Precision(bits, 32, bits % 2 == 0) for bits in (2, 3, 4, 5, 6, 8)), Precision(3, 64), Precision(4, -1))


def mixed(folder: Path, seed: int = 0) -> PrecisionMap:
    """Every unit at a random precision that fits its rows, gate_up and down apart; the rest quantized too."""
    draw, source = random.Random(seed), open_source(folder)
    model = inventory_of(source, describe(source))
    experts = {}
    for group in GROUPS:
        experts[group] = {}
        for layer, shape in model.layers.items():
            rows = shape.matrices(group)[0][1]
            cells = [kind for kind in KINDS if kind.group_size == -1 or rows % kind.group_size == 0]
            experts[group][layer] = tuple(draw.choice(cells) for _ in range(shape.experts))
    return PrecisionMap(experts, REST, {})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """``packed(family) -> (original, packed folder)``."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            original = save_tiny(family, folder / "original", hidden_size=128, **SIZES[family])
            pack_model(original, folder / "packed", mixed(original))
            made[family] = original, folder / "packed"
        return made[family]

    return make


def by_vllm(folder: Path, **options: Any) -> list[list[int]]:
    """Greedy tokens after each prompt."""
    from vllm import LLM, SamplingParams

    settings = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 4} | options
    llm = LLM(str(folder), **settings)
    try:
        sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        asked = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        return [list(o.outputs[0].token_ids) for o in llm.generate(asked, sampling, use_tqdm=False)]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def by_transformers(folder: Path) -> list[list[int]]:
    model = load(folder, torch.float32)
    made = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                                 min_new_tokens=NEW)  # fmt: skip
        made.append(out[0, len(prompt) :].tolist())
    return made


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_tokens_are_those_of_transformers(family: str, packed: Callable[[str], tuple[Path, Path]]) -> None:
    _, folder = packed(family)
    assert by_vllm(folder) == by_transformers(folder)


def test_deepseek_v2_equals_its_dequantized_checkpoint(
    packed: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    original, folder = packed("deepseek_v2")
    assert by_vllm(folder) == by_vllm(dequantized(original, folder, tmp_path / "dense"))


def test_the_bundled_model_with_mixed_widths(tmp_path: Path) -> None:
    original = bundled_model()
    pack_model(original, tmp_path / "packed", mixed(original))
    assert by_vllm(tmp_path / "packed") == by_transformers(tmp_path / "packed")


@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": False},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    ],
    ids=["compiled", "tp2", "tp2-ep"],
)
def test_other_ways_to_run_give_the_same_tokens(
    options: dict[str, Any], packed: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "tensor_parallel_size" in options:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    _, folder = packed("qwen2_moe")
    assert by_vllm(folder, **options) == by_vllm(folder)


def test_a_missing_tensor_is_refused(packed: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, folder = packed("olmoe")
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors.index.json").unlink()
    rewrite(broken, {"model.layers.0.mlp.experts.2.down_proj.qweight": None})
    with pytest.raises(Exception, match=r"down_proj\.qweight"):
        by_vllm(broken)


@contextmanager
def served(folder: Path, log: Path, flags: str) -> Iterator[Any]:
    """A client of ``mopeq serve`` with vLLM."""
    from openai import APIConnectionError, OpenAI

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"--vllm=--enforce-eager --max-num-seqs 4 {flags}"
    command = ["serve", str(folder), "--port", str(port), "--name", "tiny", "--dtype", "float32", flags]
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-c", "import sys; from mopeq.cli import main; sys.exit(main())", *command],
            stdout=out, stderr=out, env={**os.environ, "MOPEQ_API_KEY": "secret"},
        )  # fmt: skip
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0, timeout=60)
        until = time.monotonic() + 480  # a busy machine takes minutes
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, f"no answer in 480 s\n{log.read_text()[-3000:]}"
            try:
                assert client.models.list().data[0].id == "tiny"
                break
            except APIConnectionError:
                time.sleep(1)
        yield client
    finally:
        server.terminate()
        server.wait(60)


def test_mopeq_serve_starts_vllm(packed: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    from openai import AuthenticationError

    _, folder = packed("olmoe")
    with served(folder, tmp_path / "log", "--max-model-len 256") as client:
        made = [
            client.completions.create(
                model="tiny", prompt=prompt, max_tokens=NEW, temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            ).choices[0].token_ids
            for prompt in PROMPTS
        ]  # fmt: skip
        assert made == by_vllm(folder)
        with pytest.raises(AuthenticationError):
            client.with_options(api_key="guess").models.list()


def test_deepseek_vl2_with_images_is_the_native_runtimes(tmp_path: Path) -> None:
    """Packed, served, asked by the ``openai`` client: the words of mopeq's own model, tower, tiles and conversation."""
    from mopeq.data.conversations import read_questions
    from mopeq.data.samples import bundled_images, bundled_vlm
    from mopeq.load import load_processor
    from mopeq.runtime.generate import generate

    folder = tmp_path / "packed"
    pack_model(bundled_vlm(), folder, mixed(bundled_vlm()))
    shutil.copy(bundled_vlm() / "processor_config.json", folder)
    model, processor = load(folder, torch.float32), load_processor(folder)
    questions = read_questions(bundled_images("heldout.tsv"))[:600:50]
    with served(folder, tmp_path / "log", "--max-model-len 512") as client:
        for number, question in enumerate(questions):
            address = f"data:image/png;base64,{question.images[0]}"
            text = {"type": "text", "text": question.text}
            count = number % 3  # images: none, one, two
            ours = [*[{"type": "image", "image": address}] * count, text]
            theirs = [*[{"type": "image_url", "image_url": {"url": address}}] * count, text]
            want = generate(model, processor, [{"role": "user", "content": ours}], max_new_tokens=8)
            got = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": theirs}], max_tokens=8, temperature=0
            )
            assert got.choices[0].message.content == want.text
            assert got.usage.prompt_tokens == want.prompt_tokens
            assert not count or want.text.strip()


def test_molmoe_with_an_image_is_the_native_runtimes(tmp_path: Path) -> None:
    """A random model as large as vLLM's attention wants, with the published names, processor and conversation."""
    from openai import BadRequestError
    from transformers import AutoConfig, AutoModelForImageTextToText

    from mopeq.load import load_processor
    from mopeq.runtime.generate import generate
    from reference import FILES, FOLDER, MOLMOE, PROCESSORS

    settings = json.loads((FOLDER / MOLMOE / "config.json").read_text()) | {"d_model": 128}
    torch.manual_seed(0)
    original = AutoModelForImageTextToText.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.normal_(std=0.15) if parameter.ndim > 1 else parameter.normal_(1, 0.1)
    original.save_pretrained(tmp_path / "original")
    folder = tmp_path / "packed"
    pack_model(tmp_path / "original", folder, mixed(tmp_path / "original"))
    shutil.copytree(PROCESSORS / FILES[MOLMOE], folder, dirs_exist_ok=True)
    model, processor = load(folder, torch.float32), load_processor(folder)
    pictures = [PROCESSORS / "images" / name for name in ("img_a_wide.png", "img_b_tall.png")]
    answers = set()
    with served(folder, tmp_path / "log", "--max-model-len 512") as client:

        def ask(*shown: Path) -> Any:
            urls = [f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in shown]
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            said = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]
            return client.chat.completions.create(
                model="tiny", messages=said, max_tokens=8, temperature=0, extra_body={"return_token_ids": True}
            )

        for shown in ([], pictures[:1], pictures[1:]):
            parts = [*({"type": "image", "path": path} for path in shown), {"type": "text", "text": "What is this?"}]
            want = generate(model, processor, [{"role": "user", "content": parts}], max_new_tokens=8)
            got = ask(*shown)
            assert got.choices[0].token_ids == list(want.tokens)
            assert got.usage.prompt_tokens == want.prompt_tokens
            answers.add(want.tokens)
        assert len(answers) == 3
        with pytest.raises(BadRequestError, match="1 image"):
            ask(*pictures)
