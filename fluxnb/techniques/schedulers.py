"""Other solvers of the same flow: the second-order control that a cache has to stand beside."""

from __future__ import annotations

from dataclasses import dataclass

from fluxnb.families import SECOND_ORDER
from fluxnb.technique import ANOTHER, Changes, Technique


@dataclass
class DPMSolver(Technique):
    """DPM-Solver++ of second order over flow sigmas, with the pipeline's own shift.

    Source: Lu et al., 2022; diffusers' DPMSolverMultistepScheduler.
    """

    family, exact = SECOND_ORDER, ANOTHER
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
        with Changes(self.label) as changes:
            changes.put(pipe, "scheduler", solver, yields=True)
        return changes.take_back
