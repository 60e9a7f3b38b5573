"""Other solvers of the same flow: the second-order control that a cache has to stand beside."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from fluxnb.errors import UserError
from fluxnb.families import SECOND_ORDER
from fluxnb.technique import ANOTHER, Changes, Technique


@dataclass
class DPMSolver(Technique):
    """DPM-Solver++ of second order over flow sigmas, with the pipeline's own shift.

    Source: Lu et al., 2022; diffusers' DPMSolverMultistepScheduler.
    """

    family, exact = SECOND_ORDER, ANOTHER
    needed = ("scheduler",)
    name = label = "DPM-Solver++"
    settings = {"scheduler": "dpm-solver++ 2M"}

    def apply(self, pipe):
        """Puts the solver in place of the pipeline's scheduler; returns the function that puts it back."""
        from diffusers import DPMSolverMultistepScheduler

        before = pipe.scheduler
        shifted = before.config.get("use_dynamic_shifting", False)
        solver = DPMSolverMultistepScheduler(
            num_train_timesteps=before.config.num_train_timesteps,
            solver_order=2,
            prediction_type="flow_prediction",
            algorithm_type="dpmsolver++",
            use_flow_sigmas=True,
            flow_shift=1.0 if shifted else before.config.get("shift", before.config.get("flow_shift", 1.0)),
            use_dynamic_shifting=shifted,
        )
        # FLUX's pipelines work out the shift from these
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        solver.register_to_config(**{n: before.config[n] for n in names if n in before.config})
        # not functions of their own: of a copied pipeline they are the copy's
        solver.set_timesteps = functools.partial(_set_timesteps, solver)  # type: ignore[method-assign]
        solver.scale_noise = functools.partial(_scale_noise, solver)  # type: ignore[attr-defined]
        with Changes(self.label) as changes:
            changes.put(pipe, "scheduler", solver, yields=True)
        return changes.take_back


def _set_timesteps(solver, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None) -> None:
    """The solver's own, and with diffusers' default sigmas, which all of FLUX's pipelines but the first one give."""
    if sigmas is not None:
        num_inference_steps = len(sigmas)
        if not np.allclose(sigmas, np.linspace(1, 1 / num_inference_steps, num_inference_steps)):
            raise UserError("DPM-Solver++ has sigmas of its own: leave yours out, or take the solver off.")
    shift = mu if solver.config.use_dynamic_shifting else None  # FLUX.1-schnell's scheduler has a fixed one
    type(solver).set_timesteps(solver, num_inference_steps, device, shift, timesteps)


def _scale_noise(solver, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A sample with the noise of a timestep, (n,), as image-to-image begins: sigma * noise + (1 - sigma) * sample."""
    times = solver.timesteps.to(timestep.device)
    indices = [int((times == time).nonzero()[0]) for time in timestep.flatten()]
    sigma = solver.sigmas[indices].to(sample.device, sample.dtype)
    sigma = sigma.reshape(-1, *[1] * (sample.dim() - 1))
    return sigma * noise + (1 - sigma) * sample
