"""A tiny run on disk, as far as the tests of stitching, evaluation and report need it."""

import json
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import CONFIGURATION, TOKENS, write_table

FINGERPRINT = "f" * 64
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = [f"{'self_attn' if number < 4 else 'mlp'}.{kind}" for number, kind in enumerate(KINDS)]
BLOCKS = 2
VOCABULARY = 64
SEARCH = {"strategy": "evolution", "target": 3.0, "variants": "gptq", "fitness": "kl"}


def tiny_model(dtype: torch.dtype = torch.float32, *, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def provenance(settings: object = None, fingerprint: str = FINGERPRINT) -> Provenance:
    return Provenance("test", json.dumps(settings or {}), fingerprint)


def write_model(run: Run, model: LlamaForCausalLM, source: dict | None = None) -> None:
    """The dense model's folder with a tokenizer and a chat template, and its manifest."""
    model.save_pretrained(run.model)
    write_tokenizer(run.model)
    source = source or {"source": "hub", "id": "someone/tiny-llama", "revision": "main"}
    manifest = {"fingerprint": FINGERPRINT, "source": source, "origin": {"commit": "0" * 40}}
    run.model_manifest.write_text(json.dumps(manifest))


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of the words w2 to w63, with a chat template."""
    words = {"<unk>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder)


def write_tokens(
    run: Run,
    dataset: str,
    sequences: int = 3,
    length: int = 12,
    seed: int = 0,
    fingerprint: str = FINGERPRINT,
    starts: list[list[int]] | None = None,
    settings: object = None,
    vocabulary: int = VOCABULARY,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (sequences, length), generator=generator)
    frame = pd.DataFrame(
        {
            "sequence": range(sequences),
            "documents": [["text"]] * sequences,
            "tokens": tokens.int().tolist(),
            "starts": starts or [[]] * sequences,
        }
    )
    write_table(frame, run.tokens(dataset), TOKENS, provenance(settings or {"source": "file"}, fingerprint))
    return tokens


def write_configuration(
    run: Run, search: str, level: str | None = None, fingerprint: str = FINGERPRINT
) -> pd.DataFrame:
    """A configuration with levels 2, 3 and 4 by turns, or one level everywhere."""
    rows = []
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_model().state_dict().items()}
    for block in range(BLOCKS):
        for number, layer in enumerate(LAYERS):
            unit = f"model.layers.{block}.{layer}"
            weights = shapes[f"{unit}.weight"][0] * shapes[f"{unit}.weight"][1]
            chosen = level or str(2 + (number + block) % 3)
            bits = int(chosen)
            rows.append(
                (unit, block, layer, "gptq", "bits", chosen, float(bits), bits * weights, weights, bits * weights // 8)
            )
    frame = pd.DataFrame(rows, columns=CONFIGURATION.names)
    settings = SEARCH if level is None else {"strategy": "uniform", "target": float(level), "variants": "gptq"}
    write_table(frame, run.configuration(search), CONFIGURATION, provenance(settings, fingerprint))
    return frame


def make_results(folder: Path, **options: object) -> Run:
    run = Run(folder / "run")
    write_model(run, tiny_model(**options))  # type: ignore[arg-type]
    return run
