"""How well an image fits its prompt, as a given CLIP sees it (Radford et al. 2021; CLIP score: Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from fluxnb.errors import UserError
from fluxnb.models import folders


@lru_cache(maxsize=1)
def load(source: str) -> tuple:
    """(model, tokenizer, image processor) of a hub id or local folder, on the CPU in float32.

    Raises UserError for what isn't a whole CLIP of transformers.
    """
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    try:
        if folders.written(source).is_dir():
            folders.check_safe(folders.written(source))
        given: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32, **folders.SAFE}
        both: Any = CLIPModel.from_pretrained(source, **given)
        model, found = both
        if found["missing_keys"]:
            raise ValueError("its weights are another model's")
        return model.eval(), CLIPTokenizer.from_pretrained(source), CLIPImageProcessorPil.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"study.clip is {source}, which is no CLIP of transformers ({why.rstrip('.')}): give the hub id or the "
            "folder of one, with its tokenizer and preprocessor, or null."
        ) from None


@torch.inference_mode()
def scores(source: str, prompts: Sequence[str], images: Sequence) -> list[float]:
    """Cosine (-1 to 1) of each image and its prompt, which is cut at the 77 tokens that a CLIP reads.

    On the CUDA device if there is one, which holds the model no longer than this takes.
    """
    (model, tokenizer, processor), device = load(source), "cuda" if torch.cuda.is_available() else "cpu"
    text = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(device)
    pixels = processor(images=list(images), return_tensors="pt").to(device)
    try:
        given = model.to(device)(**text, **pixels)
    finally:
        model.to("cpu")
    return (given.text_embeds * given.image_embeds).sum(-1).tolist()
