"""The embedded model: a FLUX pipeline small enough to ship with the package and to run on a laptop's CPU.

Every part is the ordinary diffusers or transformers class, only smaller: an MM-DiT transformer with double
and single blocks, rotary positions and a guidance embedding, a T5 encoder, a CLIP text encoder, a 16-channel
f8 VAE and the flow-matching Euler scheduler with FLUX's resolution-dependent shift. `fluxnb.training.train` trains it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fluxnb.errors import UserError

NAME = "embedded"  # as a model
FOLDER = Path(__file__).parent / "weights" / "embedded"
SCHNELL = "embedded-schnell"  # the same distilled to four steps without guidance
SCHNELL_FOLDER = FOLDER.with_name(SCHNELL)  # of transformer and scheduler; the rest is the embedded model's
FOLDERS = {NAME: FOLDER, SCHNELL: SCHNELL_FOLDER}
SCHNELL_STEPS = 4
SCHNELL_SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}  # FLUX.1-schnell's values
TOKENS = 24  # T5 tokens of a prompt; padding is attended to, as in FLUX, so the number is part of the model
CLIP_TOKENS = 32
GUIDANCE = 3.5  # the default guidance scale, FLUX.1-dev's

TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,  # 16 latent channels, packed 2 x 2
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 32,
    "num_attention_heads": 5,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (40, 80, 96, 96),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 128,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
    "scaling_factor": 1.0,  # both are set from the statistics of the latents in training
    "shift_factor": 0.0,
}
SCHEDULER = {  # FLUX.1-dev's values
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def t5_tokenizer():
    """A T5 tokenizer with one token for each word of the grammar, in lower, Title and UPPER case."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -12.0), (",", -4.0), ("▁,", -4.0)]
    pieces += [("▁" + word, -4.0) for word in _cased_words()]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def _cased_words() -> list[str]:
    from fluxnb.world.scenes import vocabulary

    words = vocabulary()
    forms = [*words, *(w.title() for w in words), *(w.upper() for w in words)]
    return list(dict.fromkeys(forms))  # "a" has one upper-case form only


def tie_letter_case(t5) -> None:
    """Gives the Title and UPPER case of each word the embedding that was trained for its lower case."""
    import torch

    tokenizer = t5_tokenizer()
    table = t5.get_input_embeddings().weight
    with torch.no_grad():
        for word in _cased_words():
            lower, own = tokenizer.convert_tokens_to_ids(["▁" + word.lower(), "▁" + word])
            table[own] = table[lower]


def clip_tokenizer():
    """A byte-level CLIP tokenizer whose merges make one token of each word of the grammar.

    Other words fall apart into letters, so nothing is ever out of vocabulary.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    from fluxnb.world.scenes import vocabulary

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges([*vocabulary(), ","])
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=CLIP_TOKENS
    )


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order of rank, that make one token of each word; the same for the same words.

    A word gets merges for what the earlier ones leave of it. Later merges have a lower rank, so they are used
    only where no earlier one applies, and can't break up a word that is whole already.
    """
    rank: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            known = [(rank[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair in rank]
            at = min(known)[1] if known else 0
            rank.setdefault((pieces[at], pieces[at + 1]), len(rank))
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return list(rank)


def build():
    """The untrained pipeline, in float32 on the CPU.

    Returns:
        A `diffusers.FluxPipeline` with random weights from torch's global generator.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=TRANSFORMER["pooled_projection_dim"],
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=TRANSFORMER["joint_attention_dim"],
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(clip_config),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(t5_config),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(**TRANSFORMER),
    )


def export(name: str, target: Path) -> None:
    """Writes a shipped model as a whole folder in diffusers' format, which needs nothing of fluxnb; all of it or none.

    Raises UserError for a name that isn't one of `FOLDERS`, and for a folder that isn't empty or can't be written.
    """
    if name not in FOLDERS:
        raise UserError(f"There is no model {name!r} to export: choose {' or '.join(FOLDERS)}.")
    try:
        _write(FOLDERS[name], target)
    except OSError as error:
        raise UserError(f"{target} can't be written ({error.strerror}): give another place.") from error


def _write(source: Path, target: Path) -> None:
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is no folder: make it first, or give another place.")
    if (there := target.exists()) and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already and is no empty folder: give a new one.")
    parts = [source / path.name for path in FOLDER.iterdir() if path.is_dir()]
    parts = [part if part.is_dir() else FOLDER / part.name for part in parts]
    files = {path: target / path.parent.name / path.name for part in parts for path in part.iterdir()}
    about = [FOLDER / "model_index.json", *(path for path in source.iterdir() if path.is_file())]
    files |= {path: target / path.name for path in about}
    try:
        for path, copy in files.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)  # not its mode
    except BaseException:
        for path in [*target.iterdir()] if there else [target]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise
