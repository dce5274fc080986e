"""What is written as GGUF reads back as the same model: same logits, same tokens; or it is refused by name."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from evopress.export.gguf.file import Packed, write_gguf
from evopress.models.gguf_config import read_config
from evopress.models.gguf_header import read_gguf_header
from evopress.models.gguf_pretokenizers import PRETOKENIZERS
from evopress.models.gguf_tokenizer import save_tokenizer
from evopress.models.gguf_weights import read_weights
from evopress.util.errors import ModelError, UnsupportedArchitectureError
from tests.runtime.tiny_models import ALTERNATING, TINY, byte_level, folder_of, sentencepiece, tiny

F16, F32, Q8_0 = GGMLQuantizationType.F16, GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0


def reread(path: Path) -> transformers.PreTrainedModel:
    """The model that a GGUF file stands for."""
    header, config = read_gguf_header(path), read_config(path)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(read_weights(path, header, model, torch.float32), strict=False)
    model.tie_weights()
    return model


def logits(model: transformers.PreTrainedModel, length: int = 24) -> torch.Tensor:
    tokens = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", TINY)
def test_the_file_reads_back_as_the_same_model(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    write_gguf(folder_of(model, tmp_path / "model"), tmp_path / "x.gguf", {}, name="tiny", dense=F32)
    torch.testing.assert_close(logits(reread(tmp_path / "x.gguf")), logits(model), atol=1e-4, rtol=1e-4)
