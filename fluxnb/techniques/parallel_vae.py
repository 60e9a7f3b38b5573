"""The VAE's decoder on several GPUs, each with some rows of the picture, and with the picture that one GPU would make.

Nothing is blended and nothing is cut: a convolution gets the row next to its share from its neighbour, a group norm its
statistics from all ranks, the attention in the middle keys and values of all pixels. What crosses between ranks is
small, so this is for latency where the rest of an image has become fast, and for pictures that one GPU can't decode.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from fluxnb.errors import UserError
from fluxnb.families import PARALLEL
from fluxnb.technique import ROUNDING, Changes, Technique, Unavailable
from fluxnb.techniques.parallel import Group, wait


@dataclass
class ParallelVAE(Technique):
    """Every rank decodes its share of the latents' rows, exactly. Source: DistVAE (xDiT), for the idea."""

    family, exact = PARALLEL, ROUNDING
    needed = ("vae",)
    name = label = "parallel VAE"
    settings = {"vae": "parallel"}

    def apply(self, pipe):
        """Divides from the next picture on; returns the function that undoes it."""
        if not dist.is_initialized() or dist.get_world_size() < 2:
            raise Unavailable("needs at least 2 ranks, started by fluxnb.measure.ranks")
        decoder, counts = pipe.vae.decoder, dict.fromkeys(_SHARED.values(), 0)
        if decoder._compiled_call_impl is not None:
            raise Unavailable("needs the VAE eager or compiled afterwards")
        with Changes(self.label) as changes:
            for module in decoder.modules():
                if type(module) is nn.Conv2d and module.kernel_size != (1, 1):
                    if (module.kernel_size, module.stride, module.padding) != ((3, 3), (1, 1), (1, 1)):
                        raise Unavailable("needs a decoder whose convolutions see one row beyond their own")
                if (kind := _SHARED.get(type(module))) and getattr(module, "kernel_size", None) != (1, 1):
                    changes.put(module, "__class__", kind)
                    counts[kind] += 1
            for attention in decoder.mid_block.attentions:
                changes.put(attention, "processor", _Attention())
            changes.wrap(decoder, _divided)
            ranks = dist.get_world_size()
            self.proof = {"decoded": f"{counts[_Conv2d]} convolutions in {ranks} shares of the rows"}
        return changes.take_back


def _divided(original):
    @functools.wraps(original)
    def forward(latents, *args, **kwargs):
        world, rows = dist.get_world_size(), latents.shape[2]
        if rows % world:
            raise UserError(f"{rows} rows of latents can't be divided by {world} ranks: choose another height.")
        own = original(latents.chunk(world, 2)[dist.get_rank()], *args, **kwargs)
        return torch.cat(_gathered(own), 2)

    return forward


def _gathered(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors of all ranks, in their order."""
    everyone = Group.of(dist.group.WORLD)
    return wait(*everyone.gather(x)).chunk(everyone.world)


class _Conv2d(nn.Conv2d):
    """A 3 × 3 convolution over the rows of all ranks."""

    def forward(self, x):
        rank, borders = dist.get_rank(), _gathered(torch.cat([x[:, :, :1], x[:, :, -1:]], 2))
        nothing = torch.zeros_like(x[:, :, :1])
        above = borders[rank - 1][:, :, 1:] if rank else nothing
        below = borders[rank + 1][:, :, :1] if rank + 1 < len(borders) else nothing
        return functional.conv2d(torch.cat([above, x, below], 2), self.weight, self.bias, padding=(0, 1))


class _GroupNorm(nn.GroupNorm):
    """A group norm with the mean and the variance of all ranks' rows."""

    def forward(self, x):
        groups = x.float().unflatten(1, (self.num_groups, -1)).flatten(2)
        own = torch.stack([groups.mean(-1), groups.var(-1, correction=0)])
        means, variances = torch.stack(_gathered(own), 1)  # each (ranks, batch, groups)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        normed = (groups - mean[..., None]) * torch.rsqrt(variance + self.eps)[..., None]
        shape = (1, -1, *[1] * (x.ndim - 2))
        normed = normed.reshape(x.shape) * self.weight.float().view(shape) + self.bias.float().view(shape)
        return normed.to(x.dtype)


_SHARED = {nn.Conv2d: _Conv2d, nn.GroupNorm: _GroupNorm}


class _Attention:
    """The decoder's one attention: this rank's pixels look at the pixels of all."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        query, (key, value) = attn.to_q(x), (torch.cat(_gathered(layer(x)), 1) for layer in (attn.to_k, attn.to_v))
        heads = [t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value)]
        out = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out)).transpose(1, 2).reshape(hidden_states.shape)
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor
