# SPDX-License-Identifier: Apache-2.0
"""Models of a few thousand parameters and batches for them, the same on every rank."""

import torch

VOCAB, HIDDEN, LAYERS, HEADS, POSITIONS = 33, 16, 2, 4, 64


def _gpt_neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=32,
            max_position_embeddings=POSITIONS,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=POSITIONS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=POSITIONS,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _esm():
    from transformers import EsmConfig, EsmForMaskedLM

    return EsmForMaskedLM(
        EsmConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=32,
            max_position_embeddings=POSITIONS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            position_embedding_type="rotary",
            token_dropout=True,
            emb_layer_norm_before=True,
            initializer_range=0.1,
            pad_token_id=1,
            mask_token_id=2,
        )
    )


def _vit():
    """Nine patches and a class token."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=12,
            patch_size=4,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
            num_labels=5,
        )
    )


def _timm():
    """The same in timm. Its layers start at 0.02, where attention is all but uniform, so weights are drawn again."""
    from tests.helpers import timm_models

    model = timm_models.load().create_model(
        "vit_tiny_patch16_224",
        img_size=12,
        patch_size=4,
        embed_dim=HIDDEN,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=5,
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _genslm(position_embedding, **settings):
    from deepspeed_ds4sci.models import GenSLM, GenSLMConfig

    return GenSLM(
        GenSLMConfig(
            hidden_size=HIDDEN,
            num_layers=LAYERS,
            num_heads=HEADS,
            intermediate_size=32,
            max_positions=POSITIONS,
            vocab_size=VOCAB,
            position_embedding=position_embedding,
            init_std=0.1,
            rotary_fraction=0.5,
            **settings,
        )
    )


BUILDERS = {
    "genslm-learned": lambda: _genslm("learned"),
    "genslm-rotary": lambda: _genslm("rotary"),
    "genslm-alibi": lambda: _genslm("alibi"),
    "genslm-encoder": lambda: _genslm("rotary", causal=False),
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "llama": _llama,
    "esm": _esm,
    "vit": _vit,
    "timm": _timm,
}


def build(name):
    """The model, with weights that depend on its name alone."""
    torch.manual_seed(1234)
    model = BUILDERS[name]()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases start at 0 and gains at 1, which would hide a wrong sum
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def batch(name, rows, seq_len, seed, ignored=0.3):
    """`rows` sequences with labels, of which a share does not count; or images, each with one."""
    generator = torch.Generator().manual_seed(seed)
    if name in ("vit", "timm"):
        images = torch.randn(rows, 3, 12, 12, generator=generator)
        return {"pixel_values": images, "labels": torch.randint(5, (rows,), generator=generator)}
    tokens = torch.randint(5, VOCAB, (rows, seq_len), generator=generator)
    labels = tokens.clone()
    labels[torch.rand(labels.shape, generator=generator) < ignored] = -100
    if name == "esm":
        masked = torch.rand(tokens.shape, generator=generator) < 0.2
        tokens = tokens.masked_fill(masked, 2)
    return {"input_ids": tokens, "labels": labels}


def with_padding(batch, lengths):
    """The batch with an attention mask that ends each sequence at its length; no label counts beyond it."""
    mask = torch.arange(batch["input_ids"].shape[1])[None] < torch.tensor(lengths)[:, None]
    tokens = batch["input_ids"].masked_fill(~mask, 1)
    labels = batch["labels"].masked_fill(~mask, -100)
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask.long()}
