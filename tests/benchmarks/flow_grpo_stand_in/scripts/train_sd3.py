"""A script that cannot be imported; one function of it is wanted."""

import torch
from absl_that_is_not_installed import app  # type: ignore[import-not-found]
from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob  # type: ignore[import-not-found]


def compute_log_prob(transformer, pipeline, sample, j, embeds, pooled_embeds, config):
    """Step j of the samples under the policy as it is; the unconditional branch is left out of the gradient."""
    branches = 2 if config.train.cfg else 1
    v = transformer(
        hidden_states=torch.cat([sample["latents"][:, j]] * branches),
        timestep=torch.cat([sample["timesteps"][:, j]] * branches),
        encoder_hidden_states=embeds,
        pooled_projections=pooled_embeds,
        return_dict=False,
    )[0]
    if branches == 2:
        noise_pred_uncond, conditional = v.chunk(2)
        noise_pred_uncond = noise_pred_uncond.detach()
        v = noise_pred_uncond + config.sample.guidance_scale * (conditional - noise_pred_uncond)
    return sde_step_with_logprob(
        pipeline.scheduler,
        v.float(),
        sample["timesteps"][:, j],
        sample["latents"][:, j].float(),
        noise_level=config.sample.noise_level,
        prev_sample=sample["next_latents"][:, j].float(),
    )


app.run()
