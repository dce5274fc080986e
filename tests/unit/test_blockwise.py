"""Running block by block gives the logits of the full model, whatever the architecture."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from architectures import CONFIGS, LENGTH, MORE_CONFIGS, build, save, tokens
from safetensors.torch import load_file, save_file
from torch import nn

from evopress.artifacts.paths import Run
from evopress.config.context import ComputeSettings, StageContext
from evopress.models.blockwise import BlockwiseModel
from evopress.util import device
from evopress.util.errors import ModelError, UnsupportedArchitectureError

CPU = torch.device("cpu")


def run_all(model: BlockwiseModel, ids: torch.Tensor) -> torch.Tensor:
    hidden, inputs = model.embed(ids)
    for index in range(len(model.blocks)):
        hidden = model.run_block(index, hidden, inputs)
    return model.logits(hidden)


def full_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama"), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def llama(llama_folder: Path) -> BlockwiseModel:
    return BlockwiseModel.from_folder(llama_folder, CPU)


@pytest.mark.parametrize("name", [*CONFIGS, *MORE_CONFIGS])
def test_logits_are_those_of_the_full_model(name: str, tmp_path: Path) -> None:
    folder = save(build(name), tmp_path)
    model = BlockwiseModel.from_folder(folder, CPU)
    logits = run_all(model, tokens())
    assert logits.shape == (3, LENGTH, model.vocab_size)
    assert torch.equal(logits, full_logits(folder, tokens()))


def test_names_beside_a_vision_tower_that_the_causal_model_lacks(tmp_path: Path) -> None:
    """All of Qwen3.5 is published so: `model.language_model.` where its causal language model has `model.`."""
    sizes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=MORE_CONFIGS["qwen3.5"][1], vision_config=sizes)
    folder = save(transformers.Qwen3_5ForConditionalGeneration(config).eval(), tmp_path)
    assert "model.language_model.norm.weight" in load_file(folder / "model.safetensors")
    model = BlockwiseModel.from_folder(folder, CPU)
    assert model.block_names[0] == "model.layers.0"
    assert torch.equal(run_all(model, tokens()), full_logits(folder, tokens()))


def test_text_model_beside_a_vision_tower(tmp_path: Path) -> None:
    """Published checkpoints have `language_model.model.` where transformers now has `model.language_model.`."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=CONFIGS["gemma3"][1], vision_config=vision, mm_tokens_per_image=4)
    folder = save(transformers.Gemma3ForConditionalGeneration(config).eval(), tmp_path)
    assert "language_model.model.norm.weight" in load_file(folder / "model.safetensors")
    model = BlockwiseModel.from_folder(folder, CPU)
    assert len(model.blocks) == 3
    assert torch.equal(run_all(model, tokens()), full_logits(folder, tokens()))


@pytest.mark.parametrize("name", ["mistral", "phi3-sliding", "qwen2-sliding", "gemma2", "gemma3"])
def test_sliding_windows_matter_in_these_tests(name: str, tmp_path: Path) -> None:
    """If the windows did not change the logits, the test above could not notice a wrong mask."""
    ids = tokens(1)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 96
    model = BlockwiseModel.from_folder(save(build(name), tmp_path), CPU)
    windows = model.config.sliding_window
    hidden, inputs = model.embed(ids)
    changed, _ = model.embed(other)
    masks = [kwargs["attention_mask"] for kwargs in inputs.kwargs]
    assert any(mask is not None for mask in masks) and windows == 4
    sliding = next(index for index, mask in enumerate(masks) if mask is not None)
    after = [model.run_block(sliding, states, inputs) for states in (hidden, changed)]
    assert torch.equal(after[0][0, windows:], after[1][0, windows:])
    assert not torch.equal(after[0][0, : windows - 1], after[1][0, : windows - 1])


def test_bfloat16_checkpoint_keeps_its_dtype_and_logits(tmp_path: Path) -> None:
    folder = save(build("gemma2").to(torch.bfloat16), tmp_path)
    model = BlockwiseModel.from_folder(folder, CPU)
    assert model.dtype == torch.bfloat16
    assert torch.equal(run_all(model, tokens()), full_logits(folder, tokens()))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_quick_model_computes_in_float32_where_16_bits_are_only_emulated(
    stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(build("gemma3").to(stored), tmp_path)
    monkeypatch.setattr(device, "_multiplies", lambda dtype, on: False)
    model = BlockwiseModel.from_folder(folder, CPU, quick=True)
    assert (model.dtype, model.stored) == (torch.float32, stored)
    wide = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(run_all(model, tokens()), wide(tokens()).logits)
    monkeypatch.setattr(device, "_multiplies", lambda dtype, on: True)
    model = BlockwiseModel.from_folder(folder, CPU, quick=True)
    assert (model.dtype, model.stored) == (stored, stored)


def test_working_dtype_is_another_only_for_16_bits_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_multiplies", lambda dtype, on: on.type != "cpu" or dtype == torch.bfloat16)
    for stored, on, expected in [
        (torch.float16, "cpu", torch.float32),
        (torch.bfloat16, "cpu", torch.bfloat16),
        (torch.float32, "cpu", torch.float32),
        (torch.float64, "cpu", torch.float64),
        (torch.float16, "cuda", torch.float16),
    ]:
        assert device.working_dtype(stored, torch.device(on)) == expected


def test_whether_the_cpu_multiplies_16_bits_is_asked_of_torch() -> None:
    cpu = torch.device("cpu")
    assert device._multiplies(torch.bfloat16, cpu) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert device._multiplies(torch.float16, cpu) == torch.ops.mkldnn._is_mkldnn_fp16_supported()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_old_gpus_emulate_bfloat16(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.working_dtype(torch.bfloat16, torch.device("cuda:0")) == expected
    assert device.working_dtype(torch.float16, torch.device("cuda:0")) == torch.float16


def test_dtype_can_be_chosen(llama_folder: Path) -> None:
    model = BlockwiseModel.from_folder(llama_folder, CPU, torch.float16)
    assert model.dtype == torch.float16
    assert {tensor.dtype for tensor in model.model.state_dict().values()} == {torch.float16}


def test_sharded_checkpoint(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert torch.equal(run_all(BlockwiseModel.from_folder(folder, CPU), tokens()), full_logits(folder, tokens()))


def test_inputs_serve_any_number_of_sequences(llama: BlockwiseModel) -> None:
    hidden, inputs = llama.embed(tokens(4))
    together = llama.run_block(0, hidden, inputs)
    apart = torch.cat([llama.run_block(0, hidden[row : row + 1], inputs) for row in range(4)])
    torch.testing.assert_close(together, apart)
    assert llama.run_block(0, hidden.repeat(5, 1, 1), inputs).shape == (20, LENGTH, 32)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-350m"])
def test_logits_are_positionwise(name: str, tmp_path: Path) -> None:
    """Callers cut hidden states into chunks of tokens, longer than any position embedding has room for."""
    model = BlockwiseModel.from_folder(save(build(name), tmp_path), CPU)
    hidden = torch.randn((5, 40, 32), generator=torch.Generator().manual_seed(0))
    flat = model.logits(hidden.reshape(1, 200, 32))
    torch.testing.assert_close(flat.reshape(5, 40, -1), model.logits(hidden))
    torch.testing.assert_close(model.logits(hidden[:, 7:9]), model.logits(hidden)[:, 7:9])


def test_replaced_weights_equal_a_model_with_those_weights(llama: BlockwiseModel, tmp_path: Path) -> None:
    changed = build("llama")
    generator = torch.Generator().manual_seed(5)
    names = ["self_attn.q_proj", "mlp.down_proj"]
    weights = {}
    for name in names:
        parameter = changed.model.layers[1].get_submodule(name).weight
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
        weights[name] = parameter.clone()
    hidden, inputs = llama.embed(tokens())
    before = llama.run_block(1, hidden, inputs)
    replaced = llama.run_block(1, hidden, inputs, weights)
    oracle = BlockwiseModel.from_folder(save(changed, tmp_path), CPU)
    assert torch.equal(replaced, oracle.run_block(1, hidden, inputs))
    assert not torch.equal(replaced, before)
    assert torch.equal(llama.run_block(1, hidden, inputs), before), "a replacement outlived its call"


def test_wrong_replacements_are_refused_and_leave_nothing(llama: BlockwiseModel) -> None:
    hidden, inputs = llama.embed(tokens())
    before = llama.run_block(0, hidden, inputs)
    with pytest.raises(ValueError, match=r"model\.layers\.0: has no linear layer 'q_proj'"):
        llama.run_block(0, hidden, inputs, {"q_proj": torch.zeros(32, 32)})
    with pytest.raises(ValueError, match=r"self_attn\.k_proj: weight \[32, 32\], expected \[16, 32\]"):
        llama.run_block(0, hidden, inputs, {"self_attn.k_proj": torch.zeros(32, 32)})
    with pytest.raises(RuntimeError):  # wrong dtype, noticed in the middle of the block
        llama.run_block(0, hidden, inputs, {"mlp.up_proj": torch.zeros(48, 32, dtype=torch.float64)})
    assert torch.equal(llama.run_block(0, hidden, inputs), before)


def test_length_must_fit_the_inputs(llama: BlockwiseModel) -> None:
    hidden, inputs = llama.embed(tokens())
    with pytest.raises(ValueError, match="length 5 with block inputs of length 12"):
        llama.run_block(0, hidden[:, :5], inputs)


def test_blocks_stay_on_disk_until_loaded(llama_folder: Path) -> None:
    model = BlockwiseModel.from_folder(llama_folder, CPU, resident=False)
    on_meta = [all(p.is_meta for p in block.parameters()) for block in model.blocks]
    assert on_meta == [True, True, True]
    hidden, inputs = model.embed(tokens())
    for index in range(3):
        model.load_block(index)
        hidden = model.run_block(index, hidden, inputs)
        model.unload_block(index)
        assert all(p.is_meta for p in model.blocks[index].parameters())
    assert torch.equal(model.logits(hidden), full_logits(llama_folder, tokens()))


def test_linear_weights_may_stay_on_disk_when_they_are_replaced(tmp_path: Path) -> None:
    folder = save(build("llama-bias"), tmp_path)
    whole = BlockwiseModel.from_folder(folder, CPU)
    model = BlockwiseModel.from_folder(folder, CPU, resident=False)
    model.load_block(2, linear_weights=False)
    layers = {name: m for name, m in whole.blocks[2].named_modules() if isinstance(m, nn.Linear)}
    assert all(model.blocks[2].get_submodule(name).weight.is_meta for name in layers)
    hidden, inputs = model.embed(tokens())
    weights = {name: layer.weight for name, layer in layers.items()}
    assert torch.equal(model.run_block(2, hidden, inputs, weights), whole.run_block(2, hidden, inputs))


def test_hooks_see_the_inputs_of_linear_layers(llama: BlockwiseModel) -> None:
    seen = []
    handle = llama.blocks[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    hidden, inputs = llama.embed(tokens())
    llama.run_block(0, hidden, inputs)
    handle.remove()
    assert seen == [(3, LENGTH, 32)]


def test_model_is_whole_again_after_an_error(llama: BlockwiseModel) -> None:
    with pytest.raises(IndexError):
        llama.embed(torch.full((1, LENGTH), 10_000))
    with pytest.raises(RuntimeError):
        llama.logits(torch.zeros(1, 2, 31))
    assert all("forward" not in vars(block) for block in llama.blocks)
    assert torch.equal(run_all(llama, tokens()), llama.model(input_ids=tokens(), use_cache=False).logits)


def test_checkpoint_without_the_model_prefix(tmp_path: Path) -> None:
    """Published OPT checkpoints hold the names of the inner model; from_pretrained takes them, and so do we."""
    folder = save(build("opt"), tmp_path)
    inner = {"decoder" + k.removeprefix("model.decoder"): v for k, v in build("opt").state_dict().items()}
    save_file(
        {name: tensor for name, tensor in inner.items() if "lm_head" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert torch.equal(run_all(BlockwiseModel.from_folder(folder, CPU), tokens()), full_logits(folder, tokens()))


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"has no tensor 'model\.norm\.weight'"):
        BlockwiseModel.from_folder(folder, CPU)
    tensors["model.norm.weight"] = norm
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(47, 32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight is \[47, 32\], .*\[48, 32\]"):
        BlockwiseModel.from_folder(folder, CPU)


def test_block_inputs_that_depend_on_tokens_are_refused(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n, for one, hands parts of the embedding to every block."""
    plain = transformers.LlamaModel.forward

    def forward(self: nn.Module, input_ids: torch.Tensor, **kwargs: object) -> object:
        return plain(self, input_ids=input_ids, per_layer=self.embed_tokens(input_ids), **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    with pytest.raises(UnsupportedArchitectureError, match=r"LlamaForCausalLM.*depends on the tokens"):
        BlockwiseModel.from_folder(llama_folder, CPU)


def test_memory_follows_the_accelerator_where_none_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for where, asked, expected in [("cpu", None, 4.0), ("cpu", 2.0, 2.0), ("cuda", 6.0, 6.0), ("cuda", None, 64.0)]:
        context = StageContext(Run(tmp_path), ComputeSettings(device=where, memory_gb=asked))
        assert context.memory_gb == expected
        assert context.compute.host_gb == (asked or 4.0)  # of which a cluster is asked, whatever card it gives
