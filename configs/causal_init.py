"""Makes the causal student that distillation starts from.

  python -m salt_jax.main --config=configs/causal_init.py:nano

`stage=ode` needs no other before it (Self Forcing): trajectories of the bidirectional teacher, then chunk-causal
regression on them. Or in two stages (Causal Forcing), the first of which makes the teacher of the second:

  python -m salt_jax.main --config=configs/causal_init.py:nano,stage=ar
  python -m salt_jax.main --config=configs/causal_init.py:nano,stage=causal_ode    regression on its trajectories, or
  python -m salt_jax.main --config=configs/causal_init.py:nano,stage=causal_cd     consistency along its steps

Latents and pairs are made first, into the workdir; a killed run goes on where it was. Real sizes learn from videos:

  python -m salt_jax.precompute --config=configs/causal_init.py:1.3b,stage=ar --prompts=videos.csv --output=latents
"""

from configs import base
from salt_jax.errors import InputError

STAGES = ('ode', 'ar', 'causal_ode', 'causal_cd')


def get_config(arg=None):
  arg = base.parse_arg(arg, size=('1.3b', 'nano', '14b'), stage=STAGES, steps=0, i2v=False)
  make = {'ode': _ode, 'ar': _ar, 'causal_ode': _causal_ode, 'causal_cd': _causal_cd}[arg.stage]
  config = make(arg.size, arg.steps)
  if arg.i2v and arg.stage != 'ode':
    raise InputError(f'the config argument i2v is for stage=ode, not stage={arg.stage}.')
  if arg.i2v:
    base.first_frames(config)
  return config


def _common(name, size, stage, steps):
  """A student of `size`, taught by a model of its own size."""
  config = base.common(name=f'{name}-{size}', stage=stage, size=size, total_steps=steps, batch=64)
  if size != 'nano':
    config.weights.teacher = config.weights.critic
  config.model = base.dit(size)
  config.teacher = base.dit(size)
  config.rollout = base.rollout(size)
  config.schedule = dict(steps=(4,), probs=(1.0,), shift=5.0)
  config.ema = dict(decay=0.99, start=0)
  config.evaluate = dict(clips=128, rows=4, steps=(4, 2), teacher_steps=24, guidance=4.0)
  return config


def _adamw(size, nano_lr, steps, **changes):
  """The released constant rate; nano's own otherwise."""
  if size == 'nano':
    return base.adamw(nano_lr, schedule='cosine', warmup=100, total=steps)
  return base.adamw(2e-6, **changes)


def _pairs(size):
  """Pairs, Euler steps of a trajectory (a multiple of the kept levels), guidance as uncond + g (cond - uncond)."""
  nano = size == 'nano'
  return dict(
    count=4096 if nano else 1536, steps=48, guidance=4.0 if nano else 6.0, batch=64 if nano else 8
  )


def _clips(config, count):
  """Clean latents: nano's are made here, those of the real sizes by `salt_jax.precompute` of videos."""
  if config.size == 'nano':
    config.data = dict(kind='latents', path='')
    config.latents = dict(count=count, batch=64)
  else:
    config.data = dict(kind='store', path='latents')


def _ode(size, steps):
  # Three hundred make a nano student that moves and is soft: what is left to sharpen is left to distillation.
  steps = steps or (300 if size == 'nano' else 3000)
  config = _common('causal_init', size, 'ode', steps)
  config.pairs = _pairs(size)
  config.optim = dict(
    generator=base.adamw(
      5e-4 if size == 'nano' else 2e-6, schedule='cosine', warmup=100, total=steps
    )
  )
  nano = size == 'nano'
  config.data = dict(kind='captions' if nano else 'prompts', path='' if nano else 'prompts.txt')
  return config


def _ar(size, steps):
  """Autoregressive diffusion, from the bidirectional teacher."""
  steps = steps or (10000 if size == 'nano' else 5000)
  config = _common('ar', size, 'ar', steps)
  _clips(config, 24576)
  # What chunks look back at: 'teacher' is the clean clip, with noise up to this sigma, 'diffusion' the noisy clip.
  config.forcing = dict(context='teacher', noise=0.0)
  config.optim = dict(generator=_adamw(size, 5e-4, steps, b1=0.0))
  if size != 'nano':
    config.ema.decay = 0.0  # the released recipe has none: the average is a copy
  config.evaluate.steps = (24,)
  return config


def _after_ar(size, stage, steps):
  config = _common(stage, size, stage, steps)
  nano = size == 'nano'
  config.weights.ar = (
    'runs/ar-nano/export/ar-nano-generator.safetensors'
    if nano
    else f'weights/ar_{size}.safetensors'
  )
  return config


def _causal_ode(size, steps):
  steps = steps or (3000 if size == 'nano' else 1000)
  config = _after_ar(size, 'causal_ode', steps)
  config.pairs = _pairs(size)
  _clips(config, config.pairs.count)
  config.optim = dict(generator=_adamw(size, 5e-4, steps))
  return config


def _causal_cd(size, steps):
  steps = steps or 3000
  config = _after_ar(size, 'causal_cd', steps)
  _clips(config, 24576)
  # Levels of the grid, guidance of the teacher's step on it as uncond + g (cond - uncond).
  config.causal_consistency = dict(steps=48, guidance=3.0)
  config.optim = dict(generator=_adamw(size, 2e-4, steps, b1=0.0))
  return config
