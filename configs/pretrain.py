"""Makes the nano teacher: the VAE, then text encoder and DiT together by flow matching.

  python -m salt_jax.main --config=configs/pretrain.py:vae
  python -m salt_jax.main --config=configs/pretrain.py:teacher
  python -m salt_jax.main --config=configs/pretrain.py:teacher,i2v

The last one's teacher is given the first frame besides the caption. A teacher writes the latents of its clips into
the workdir first. All want a GPU or a TPU.
"""

from configs import base
from salt_jax.errors import InputError


def get_config(arg=None):
  arg = base.parse_arg(arg, net=('teacher', 'vae'), steps=0, i2v=False)
  if arg.net == 'teacher':
    return _teacher(arg.steps or 28000, arg.i2v)
  if arg.i2v:
    raise InputError('the config argument i2v is for the teacher: the VAE serves both.')
  return _vae(arg.steps or 4000)


def _vae(steps):
  config = base.common(name='pretrain-vae', stage='vae', size='nano', total_steps=steps, batch=8)
  # Shorter clips are cheaper, but then colours drift in longer ones.
  config.data = dict(kind='clips', frames=81)
  config.l1_weight = 0.1
  config.kl_weight = 1e-4
  config.statistics_clips = 512  # whose latents are brought to mean 0, deviation 1 at the end
  config.optim = dict(
    vae=base.adamw(2e-3, b2=0.99, clip=1.0, schedule='cosine', warmup=100, total=steps)
  )
  config.ema = dict(decay=0.99, start=0)
  config.evaluate = dict(clips=256, rows=4)
  return config


def _teacher(steps, i2v):
  config = base.common(
    name='pretrain-teacher-i2v' if i2v else 'pretrain-teacher',
    stage='flow',
    size='nano',
    total_steps=steps,
    batch=128,
  )
  config.model = base.dit('nano', i2v)
  config.data = dict(kind='clips', frames=81)
  config.latents = dict(count=49152, batch=64)
  config.text_dropout = 0.1
  config.flow_shift = 3.0
  config.optim = dict(
    dit=base.adamw(1.5e-3, b2=0.99, clip=1.0, schedule='cosine', warmup=500, total=steps),
    text=base.adamw(1.5e-3, b2=0.99, clip=1.0, schedule='cosine', warmup=500, total=steps),
  )
  config.ema = dict(decay=0.999, start=0)
  config.evaluate = dict(clips=256, rows=4, guidance=4.0, shift=5.0, teacher_steps=(50, 24, 4, 2))
  return config
