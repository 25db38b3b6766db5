"""Text towers and tokenizers of Hugging Face, from a folder: no hub is asked."""

import json
from pathlib import Path

import pytest
import torch
from toy import VIT, make_config

from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.models.build import build_model
from dissect_clip.models.precision import autocast_for
from dissect_clip.training.scoring import Scorer, Shortcuts, cut_captions, text_pooling

transformers = pytest.importorskip("transformers", reason="pip install 'dissect-clip[hf]' brings transformers")


def write_tower(folder: Path) -> Path:
    """A BERT of one layer with a vocabulary of a few words."""
    tower = folder / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle"]
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tower)
    (tower / "vocab.txt").write_text("\n".join(words))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (tower / "tokenizer_config.json").write_text(json.dumps(settings))
    return tower


def test_a_hugging_face_text_tower_scores(tmp_path: Path):
    tower = str(write_tower(tmp_path))
    text = {"hf_model_name": tower, "hf_tokenizer_name": tower, "context_length": 8}
    content = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": text | {"hf_proj_type": "linear"}}
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "toy-hf.json").write_text(json.dumps(content))
    config = make_config(configs, model="toy-hf")
    model = build_model(config, World())
    tokens = model.tokenizer(["a red circle", "a circle"])
    assert tokens.shape == (2, 8)
    batch = Batch(torch.randn(2, 3, 16, 16), tokens, torch.arange(2))
    autocast = autocast_for("fp32", torch.device("cpu"))
    encoded = Scorer(model.module, autocast, "eval", compiled=False)(batch)
    assert encoded.text_features.shape == (2, 16)
    shorter = Scorer(model.module, autocast, "eval", False, Shortcuts(context_length=5))(batch)
    assert tokens[0].count_nonzero() == 5
    assert torch.allclose(shorter.text_features, encoded.text_features, atol=1e-5)
    cut = cut_captions(tokens, 4, *text_pooling(model.module))
    assert cut[:, -1].tolist() == [3, 3]  # [SEP]
