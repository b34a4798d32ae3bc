"""Makes the causal student that distillation starts from: teacher ODE pairs, then chunk-causal regression.

  python -m salt_jax.main --config=configs/causal_init.py:nano

The pairs are made first, into the workdir, by the teacher on captions; a killed run goes on where it was.
"""

from configs import base


def get_config(arg=None):
  arg = base.parse_arg(arg, size=('1.3b', 'nano', '14b'), steps=3000, i2v=False)
  nano = arg.size == 'nano'
  config = base.common(
    name=f'causal_init-{arg.size}',
    stage='ode',
    size=arg.size,
    total_steps=arg.steps,
    batch=64 if nano else 64,
  )
  config.model = base.dit(arg.size)
  config.teacher = base.dit(arg.size)
  config.rollout = base.rollout(arg.size)
  config.schedule = dict(steps=(4,), probs=(1.0,), shift=5.0)
  # Pairs, Euler steps of a trajectory (a multiple of the kept levels), guidance as uncond + g (cond - uncond).
  config.pairs = dict(
    count=4096 if nano else 1536, steps=48, guidance=4.0 if nano else 6.0, batch=64 if nano else 8
  )
  config.optim = dict(
    generator=base.adamw(5e-4 if nano else 2e-6, schedule='cosine', warmup=100, total=arg.steps)
  )
  config.ema = dict(decay=0.99, start=0)
  config.data = dict(kind='captions' if nano else 'prompts', path='' if nano else 'prompts.txt')
  config.evaluate = dict(clips=128, rows=4, steps=(4, 2), teacher_steps=24, guidance=4.0)
  if arg.i2v:
    base.first_frames(config)
  return config
