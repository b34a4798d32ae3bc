"""Distils a bidirectional few-step student: DMD on the eight-point grid, with the consistency term of SC-DMD.

  python -m salt_jax.main --config=configs/dmd.py:nano
  python -m salt_jax.main --config=configs/dmd.py:1.3b,method=dmd

The student is trained on eight levels; the four-step grid of inference gives the ends of its time triples.

teacher= size of the teacher above nano: 14b (the default) or 1.3b
i2v      the first frame is given, to student, teacher and critic
flf2v    first and last frame are given; of the real sizes alone
method=  sc_dmd (the default), dmd8 (the same grid without the term) or dmd (four levels)
"""

from configs import base
from salt_jax.errors import InputError


def get_config(arg=None):
  arg = base.parse_arg(
    arg,
    size=('1.3b', 'nano', '14b'),
    method=('sc_dmd', 'dmd8', 'dmd'),
    teacher='',
    i2v=False,
    flf2v=False,
  )
  if arg.i2v and arg.flf2v:
    raise InputError(
      'the config arguments i2v and flf2v exclude each other: leave one of them out.'
    )
  nano = arg.size == 'nano'
  config = base.common(
    name=f'dmd-{arg.size}-{arg.method}',
    stage='selfforcing',
    size=arg.size,
    total_steps=120 if nano else 3000,
    batch=4 if nano else 64,
  )
  config.model = base.dit(arg.size)
  frames = arg.i2v or arg.flf2v
  base.teach(config, arg.teacher, frames)
  config.rollout = base.rollout(arg.size, chunk=21)
  config.weights.init = config.weights.teacher if nano else config.weights.critic
  config.schedule = dict(steps=(4 if arg.method == 'dmd' else 8,), probs=(1.0,), shift=5.0)
  config.losses = dict(dmd=1.0, consistency=0.2 if arg.method == 'sc_dmd' else 0.0, alignment=0.0)
  config.update(base.terms(config.teacher.layers))
  config.generator_every = 2 if nano else 5
  config.optim = dict(
    generator=base.adamw(2e-4 if nano else 2e-6, b1=0.0),
    critic=base.adamw(4e-4 if nano else 4e-7, b1=0.0),
  )
  config.ema = base.ema(config)
  config.data = dict(kind='captions' if nano else 'prompts', path='' if nano else 'prompts.txt')
  config.evaluate = dict(clips=16, rows=4, steps=(4, 2), teacher_steps=24, guidance=4.0)
  config.log.samples_every = 40 if nano else 0
  if frames:
    base.first_frames(config, last=arg.flf2v)
    config.weights.init = config.weights.teacher
  return config
