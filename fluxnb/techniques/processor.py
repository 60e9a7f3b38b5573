"""FLUX's attention as diffusers computes it, with the three places where a technique may put something else.

Positions: norm and rotation of query and key as one operation (`FusedRoPE`). Exchange: what happens to
query, key and value before they attend, for a transformer that is spread over several GPUs (parallel.py).
Attend: an attention kernel that diffusers doesn't know (fp8_attention.py). Its layers take what is rounded to FP8
already, too (norms.py).
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from fluxnb import adapters
from fluxnb.technique import Changes, Unavailable
from fluxnb.techniques.rounded import project

PLACES = ("_positions", "_exchange", "_attend", "_rounded")


class Exchange:
    """What happens between a layer's projections and its attention: nothing, here.

    In two halves, so that a block can compute something else while what is exchanged is on its way.
    """

    def begin(self, query, key, value) -> tuple:
        """Sets off (batch, tokens, heads, width) tensors; what it returns `end` is given.

        `query` is a function that computes them: keys and values may be on their way before it is called.
        """
        return query(), key, value

    def end(self, attend, backend, *sent) -> torch.Tensor:
        """What attend(query, key, value) makes of what has come, (batch, tokens, heads, width).

        `backend` is what `attend` runs: one of diffusers' attention backends, None for its default.
        """
        return attend(*sent)


class Processor(FluxAttnProcessor):
    """diffusers' processor; a place that nobody has filled does what diffusers does.

    `_positions(x, norm, text, text_norm, rotary)` gives queries or keys, (batch, tokens, heads, width); `_exchange` is
    an `Exchange`; `_attend(query, key, value)` gives the output, all four (batch, tokens, heads, width);
    `_rounded(x, layer)` gives what a layer is to read, `Rounded` where it may be, as the layers before may be given.
    """

    _positions = _attend = _rounded = None
    _exchange = Exchange()

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):  # fmt: skip
        begun = self.begin(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        attended = self.end(begun, attention_mask)
        if encoder_hidden_states is None:
            return attended
        before = encoder_hidden_states.shape[1]
        given = self._rounded or (lambda x, layer: x.contiguous())
        out = attn.to_out[1](project(attn.to_out[0], given(attended[:, before:], attn.to_out[0])))
        return out, project(attn.to_add_out, given(attended[:, :before], attn.to_add_out))

    def begin(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb) -> tuple:
        """The projections, set off to where they attend; for `end`."""
        image = _projections(attn, hidden_states, "to_qkv", ("to_q", "to_k", "to_v"))
        norms, text, text_norms = (attn.norm_q, attn.norm_k), None, None
        if attn.added_kv_proj_dim is not None:
            text = _projections(attn, encoder_hidden_states, "to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))
            text_norms = attn.norm_added_q, attn.norm_added_k

        def turned(i):
            turn = self._positions or positions
            if text is None:
                return turn(image(i), norms[i], None, None, image_rotary_emb)
            return turn(image(i), norms[i], text(i), text_norms[i], image_rotary_emb)

        key = turned(1)
        value = image(2) if text is None else torch.cat([text(2), image(2)], dim=1)
        return self._exchange.begin(lambda: turned(0), key, value)

    def end(self, begun: tuple, attention_mask=None) -> torch.Tensor:
        """The attention's output, (batch, tokens, width)."""

        def attend(query, key, value):
            if self._attend is not None:
                if attention_mask is not None:
                    raise ValueError("this attention kernel takes no mask: leave the mask out, or take the kernel off")
                return self._attend(query, key, value)
            return transformer_flux.dispatch_attention_fn(  # looked up there: SageAttention is put there
                query,
                key,
                value,
                attn_mask=attention_mask,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            ).to(query.dtype)

        return self._exchange.end(attend, self._attention_backend, *begun).flatten(2, 3)


def _projections(attn, states, fused: str, layers: tuple):
    """A function of 0, 1, 2 that gives queries, keys, values, each (batch, tokens, heads, width).

    It calls one layer, unless they are `fused` into one, which is called right now.
    """
    parts = project(getattr(attn, fused), states).chunk(3, dim=-1) if attn.fused_projections else None

    def projected(i):
        part = project(getattr(attn, layers[i]), states) if parts is None else parts[i]
        return part.unflatten(-1, (-1, attn.head_dim))

    return projected


def positions(x, norm, text, text_norm, rotary):
    """Queries or keys normalised and turned, as diffusers does it; as of `norm_rope`, with the layers themselves."""
    x = norm(x)
    if text is not None:
        x = torch.cat([text_norm(text), x], dim=1)
    return x if rotary is None else apply_rotary_emb(x, rotary, sequence_dim=1)


def fill(transformer, place: str, function, changes: Changes) -> int:
    """Fills one of `PLACES` in every attention layer and gives their number.

    Raises Unavailable where a layer's processor isn't diffusers' own (an IP-adapter's, say), and where one that is
    spread over GPUs would attend with a kernel that knows nothing of it.
    """
    adapters.check(transformer, adapters.PROCESSORS)
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    processors = [block.attn.processor for block in blocks]
    strange = {type(p).__name__ for p in processors} - {FluxAttnProcessor.__name__, Processor.__name__}
    if strange:
        raise Unavailable(f"needs diffusers' own attention processors, and finds {', '.join(sorted(strange))}")
    divided = [p for p in processors if "_exchange" in vars(p) or getattr(p, "_parallel_config", None) is not None]
    if (place == "_attend" and divided) or (place == "_exchange" and any("_attend" in vars(p) for p in processors)):
        raise Unavailable("needs a whole sequence on each GPU: an attention kernel of its own has no part in exchanges")
    for processor in processors:
        changes.callback(_settle, processor)
        changes.put(processor, place, function)
        processor.__class__ = Processor
    return len(processors)


def _settle(processor) -> None:
    """diffusers' own class for a processor whose places are all empty."""
    if type(processor) is Processor and not any(name in vars(processor) for name in PLACES):
        processor.__class__ = FluxAttnProcessor  # type: ignore[assignment]
