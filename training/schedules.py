"""The noise schedule of a diffusers scheduler, as the table the method works on."""
import torch

from ode import Schedule

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}


def from_diffusers(scheduler, shift=None):
    """A diffusers scheduler -> ode.Schedule, from the scheduler's own config. Time t is its t-th
    training timestep, counted from 1.

    shift: takes the place of a flow scheduler's own. A model whose shift depends on the resolution
    gives exp(mu). Raises ValueError for a prediction type that is none of PREDICTIONS, and for a
    shift that depends on the resolution and is not given.
    """
    config = scheduler.config
    if config.get("use_dynamic_shifting") and shift is None:
        raise ValueError("its shift depends on the resolution (use_dynamic_shifting), which this "
                         "family does not do")
    pred = PREDICTIONS.get(config.get("prediction_type"))
    if "prediction_type" not in config and "FlowMatch" in type(scheduler).__name__:
        pred = "flow"
    if pred == "flow":
        return flow_table(config, shift)
    clean = torch.ones(1, dtype=torch.float64)
    alpha_squared = torch.cat([clean, scheduler.alphas_cumprod.double().cpu()])       # [T+1]
    told = torch.arange(-1, config.num_train_timesteps).clamp(min=0)
    return Schedule(alpha_squared.sqrt(), (1 - alpha_squared).sqrt(), told, pred)


def flow_table(config, shift):
    """alpha = 1 - sigma, and sigma is the shifted time. "Uniform t" of the papers is here uniform
    in the unshifted one, which is the row of the table *(choice)*."""
    T = config.num_train_timesteps
    u = torch.arange(T + 1, dtype=torch.float64) / T
    is_unipc = config.get("use_flow_sigmas")                # Wan's scheduler
    if is_unipc:                                            # its times end at 1/T
        u[1:] = u[1:] * (1 - 1 / T) + 1 / T
    shift = shift or config.get("shift") or config.get("flow_shift") or 1.0
    sigma = shift * u / (1 + (shift - 1) * u)
    told = T * sigma
    if is_unipc:                                            # networks are told whole timesteps
        told = told.floor().clamp(max=T - 1)
    return Schedule(1 - sigma, sigma, told, "flow")
