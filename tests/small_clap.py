"""A CLAP model of random weights, of transformers' own classes, in its layout on disk."""

from __future__ import annotations

from pathlib import Path


def write_small_clap(folder: Path, *, tells_texts_apart: bool = True) -> Path:
    """Returns `folder`. Its tokenizer knows single characters.

    tells_texts_apart  whether different texts have very different vectors; else all are nearly the same
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        ClapAudioConfig,
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        ClapProcessor,
        ClapTextConfig,
        PreTrainedTokenizerFast,
        set_seed,
    )

    set_seed(0)
    text = ClapTextConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                          intermediate_size=16, max_position_embeddings=64, projection_dim=8)  # fmt: skip
    audio = ClapAudioConfig(
        patch_embeds_hidden_size=8, hidden_size=16, depths=[1, 1], num_attention_heads=[2, 2], num_hidden_layers=2,
        projection_dim=8, enable_fusion=False,
    )  # fmt: skip
    model = ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=8))
    model.logit_scale_a.data.fill_(9.0)  # random vectors are alike: their differences made large
    if tells_texts_apart:
        for name, parameter in model.text_model.named_parameters():
            if "LayerNorm" not in name and name.endswith("weight"):
                parameter.data.mul_(20)
    else:
        model.text_projection.linear2.bias.data.fill_(100.0)
    model.save_pretrained(folder)
    letters = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {chr(c): c for c in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    ClapProcessor(ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad"), fast).save_pretrained(folder)
    return folder
