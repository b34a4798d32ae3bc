"""Distils a causal student on its own rollouts (Self Forcing): DMD with a critic, cache and random exits.

  python -m salt_jax.main --config=configs/selfforcing.py:nano

`nano` runs here and now, from the weights that ship with the package. Without an argument it is Wan 2.1 1.3B with the
14B teacher on a TPU slice, by the released recipe, and asks for their weights.
"""

from configs import base


def get_config(arg=None):
  arg = base.parse_arg(arg, size=('1.3b', 'nano', '14b'))
  nano = arg.size == 'nano'
  config = base.common(
    name=f'selfforcing-{arg.size}',
    stage='selfforcing',
    size=arg.size,
    total_steps=120 if nano else 600,
    batch=4 if nano else 64,
  )
  config.model = base.dit(arg.size)
  config.teacher = base.dit('nano' if nano else '14b')
  config.rollout = base.rollout(arg.size)
  # Step counts of a rollout, how often each is drawn, and the shift of their levels.
  config.schedule = dict(steps=(4,), probs=(1.0,), shift=5.0)
  config.losses = dict(dmd=1.0)
  config.dmd = dict(guidance=3.0, shift=5.0, t_min=20.0, t_max=980.0)
  config.generator_every = 2 if nano else 5  # critic updates per generator update
  config.optim = dict(
    generator=base.adamw(2e-4 if nano else 2e-6, b1=0.0),
    critic=base.adamw(4e-4 if nano else 4e-7, b1=0.0),
  )
  config.ema = dict(
    decay=0.95 if nano else 0.99, start=0 if nano else 200
  )  # start counts critic updates
  config.data = dict(kind='captions' if nano else 'prompts', path='' if nano else 'prompts.txt')
  # At the end: judged clips of held-out images and captions, and rows of the picture.
  config.evaluate = dict(clips=16, rows=4, steps=(4, 2), teacher_steps=24, guidance=4.0)
  return config
