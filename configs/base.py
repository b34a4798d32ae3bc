"""Shared pieces of the configs, and the typed parser of the argument behind the ':'."""

import dataclasses

from ml_collections import ConfigDict

from salt_jax.errors import InputError
from salt_jax.models import clip, text, vae, wan

WAN_SIZES = {'nano': wan.wan_nano, '1.3b': wan.wan_1_3b, '14b': wan.wan_14b}
I2V_SIZES = {'nano': wan.wan_nano_i2v, '14b': wan.wan_i2v_14b}
FLF2V_SIZES = {'14b': wan.wan_flf2v_14b}

# How the real sizes are sharded: over fsdp and context, and where tensor is more than 1 by heads and hidden units.
RULES = (
  ('self_attn/[qkv]/kernel$', 'columns'),
  ('cross_attn/[qkv](_img)?/kernel$', 'columns'),
  ('ffn_0/kernel$', 'columns'),
  ('(self|cross)_attn/o/kernel$', 'rows'),
  ('ffn_2/kernel$', 'rows'),
  ('.*', 'fsdp'),
)

# What Wan 2.1 steers away from, and what it puts before that where frames are given; full-width commas included.
WAN_NEGATIVE = (
  '色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，'
  '多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，'
  '倒着走'
)
WAN_NEGATIVE_I2V = '镜头晃动，' + WAN_NEGATIVE
WAN_NEGATIVE_FLF2V = '镜头切换，' + WAN_NEGATIVE_I2V


def parse_arg(arg: str | None, **spec) -> ConfigDict:
  """Reads 'nano,sink=3,flag' by a spec of defaults, and refuses what is not in it.

  A tuple in the spec is a choice: its first member is the default, and a member may be given bare. A bool may be given
  bare too. Other values take the type of their default.

  Raises:
    InputError: for an unknown word, a repeated one, or a value of the wrong type.
  """
  values = {k: v[0] if isinstance(v, tuple) else v for k, v in spec.items()}
  bare = {word: key for key, v in spec.items() if isinstance(v, tuple) for word in v}
  bare |= {key: key for key, v in spec.items() if isinstance(v, bool)}
  seen = set()
  for item in filter(None, (arg or '').split(',')):
    key, equals, value = item.partition('=')
    if not equals and key in bare:
      key, value = bare[key], key
    if key not in spec or (not equals and key not in bare.values()):
      known = ', '.join(sorted(bare) + [f'{k}=' for k in spec if k not in bare])
      raise InputError(f'the config argument "{item}" is unknown; known are: {known}.')
    if key in seen:
      raise InputError(f'the config argument "{key}" is given twice in "{arg}".')
    seen.add(key)
    values[key] = _typed(key, value, spec[key])
  return ConfigDict(values)


def _typed(key, value, default):
  if isinstance(default, tuple):
    if value not in default:
      raise InputError(f'the config argument {key}={value} is not one of {", ".join(default)}.')
    return value
  if isinstance(default, bool):
    if value not in (key, 'true', 'false'):
      raise InputError(f'the config argument {key}={value} must be true or false.')
    return value != 'false'
  try:
    return type(default)(value)
  except ValueError:
    raise InputError(
      f'the config argument {key}={value} must be of type {type(default).__name__}.'
    ) from None


def _section(dataclass) -> ConfigDict:
  return ConfigDict(dataclasses.asdict(dataclass))


def dit(size: str, i2v: bool = False, flf2v: bool = False) -> ConfigDict:
  """A DiT, given the first frame if `i2v`, and the last too if `flf2v`; above nano with remat, bfloat16 and its
  platform's attention.

  Raises:
    InputError: a size that has no such form.
  """
  sizes = FLF2V_SIZES if flf2v else I2V_SIZES if i2v else WAN_SIZES
  if size not in sizes:
    form = 'first-and-last-frame' if flf2v else 'image-to-video'
    raise InputError(f'{size} has no {form} form: choose one of {", ".join(sizes)}.')
  section = _section(sizes[size]())
  if size != 'nano':
    section.attention = 'auto'
  return section


def vae_section(size: str) -> ConfigDict:
  return _section(vae.nano_vae() if size == 'nano' else vae.wan_vae())


def text_section(size: str) -> ConfigDict:
  return _section(text.nano_text() if size == 'nano' else text.umt5_xxl())


def geometry(size: str) -> ConfigDict:
  """81 pixel frames at 16 fps, 21 latent frames; 64x64 for nano, 480x832 for Wan."""
  if size == 'nano':
    return ConfigDict(dict(frames=81, height=64, width=64, fps=16))
  return ConfigDict(dict(frames=81, height=480, width=832, fps=16))


def adamw(lr: float, **changes) -> ConfigDict:
  """AdamW behind a clip by global norm; a constant rate unless schedule='cosine' and total say otherwise."""
  fields = dict(
    lr=lr,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.01,
    clip=10.0,
    schedule='constant',
    warmup=0,
    total=0,
  )
  unknown = set(changes) - set(fields)
  if unknown:
    raise InputError(f'adamw has no field {", ".join(sorted(unknown))}.')
  return ConfigDict(fields | changes)


def ema(config: ConfigDict) -> dict:
  """The average of a distilled student: above nano it begins at iteration 200, counted in generator updates."""
  if config.size == 'nano':
    return dict(decay=0.95, start=0)
  return dict(decay=0.99, start=200 // config.generator_every)


def sharding(size: str) -> dict:
  """Mesh and rules: nano is replicated, data parallel; the real sizes shard everything over fsdp."""
  if size == 'nano':
    return dict(
      mesh=ConfigDict(dict(data=-1, fsdp=1, context=1, tensor=1)), rules=(('.*', 'replicate'),)
    )
  return dict(mesh=ConfigDict(dict(data=1, fsdp=-1, context=1, tensor=1)), rules=RULES)


def common(name: str, stage: str, size: str, total_steps: int, batch: int) -> ConfigDict:
  """What every stage has."""
  # Guidance steers away from it; nano's unconditional prompt is the empty one. In the original '' stands for this one.
  negative = {} if size == 'nano' else dict(negative=WAN_NEGATIVE)
  return ConfigDict(
    dict(
      name=name,
      stage=stage,
      size=size,
      seed=0,
      total_steps=total_steps,
      batch=batch,  # global, over all devices
      accumulate=1,  # parts of a batch, one after another: less memory, the same update
      video=geometry(size),
      vae=vae_section(size),
      text=text_section(size),
      text_length=dit(size).text_len,
      weights=weights(size),
      ema=dict(decay=0.99, start=0),
      # In steps; kept checkpoints; where they go if not to the workdir: a folder or gs://BUCKET/FOLDER.
      checkpoint=dict(every=max(1, total_steps // 5), keep=2, folder=''),
      # Lines on the terminal; every so many steps (0: never) figures of so many clips of the averaged student.
      log=dict(every=10, samples_every=0, samples=4),
      export_dtype='float16' if size == 'nano' else 'float32',
      shard_min_size=2**16,  # smaller arrays stay whole under the fsdp rule
      workers=0,  # data processes; 0 renders in threads
      **sharding(size),
      **negative,
    )
  )


def weights(size: str) -> ConfigDict:
  """Files a stage may start from; 'assets:' is the package's own folder."""
  if size == 'nano':
    files = dict(
      vae='assets:nano_vae.safetensors',
      text='assets:nano_text.safetensors',
      teacher='assets:nano_teacher.safetensors',
      init='assets:nano_init.safetensors',
      student='assets:nano_student.safetensors',
    )
  else:
    files = dict(
      vae='weights/Wan2.1_VAE.safetensors',
      text='weights/models_t5_umt5-xxl-enc-bf16.safetensors',
      tokenizer='weights/google/umt5-xxl',  # a folder with tokenizer.json or spiece.model
      teacher='weights/Wan2.1-T2V-14B.safetensors',
      init=f'weights/causal_init_{size}.safetensors',
      student=f'weights/student_{size}.safetensors',
      critic=f'weights/Wan2.1-T2V-{size.upper()}.safetensors',
    )
  return ConfigDict(files)


def teach(config: ConfigDict, word: str, i2v: bool) -> None:
  """Gives a distillation its teacher: of the size `word`, by default nano's own and 14B above.

  Raises:
    InputError: a size that cannot teach this student.
  """
  sizes = ('nano',) if config.size == 'nano' else ('14b', '1.3b')
  size = word or sizes[0]
  if size not in sizes:
    raise InputError(
      f'the config argument teacher={word} does not fit {config.size}: choose from {", ".join(sizes)}.'
    )
  if i2v and size == '1.3b':
    raise InputError('the config argument teacher=1.3b has no image-to-video form: leave it out.')
  config.teacher = dit(size)
  if size == '1.3b':
    config.name += '-teacher1.3b'
    config.weights.teacher = 'weights/Wan2.1-T2V-1.3B.safetensors'


def terms(layers: int) -> ConfigDict:
  """Numbers of the loss terms, by the released recipe; `layers` is the depth of the teacher."""
  return ConfigDict(
    dict(
      dmd=dict(guidance=3.0, shift=5.0, t_min=20.0, t_max=980.0),
      consistency=dict(
        form='endpoint', stop_grad='composed', weight='linear', target='online', warmup=0
      ),
      triples=dict(steps=(8,), segments=4, candidates=2, first_step=0, last_step=0),
      # The paper, as reported, also compares 4 steps with 8: map=((2, (4,)), (4, (8,))).
      reference=dict(map=((2, (4,)),), start=0, coupling='aligned_b', share_exit_input=False),
      alignment=dict(
        kind='relations',
        margin=0.1,
        kernel='linear',
        network='teacher',
        layer=layers // 2,
        t_low=0,
        t_high=200,
        shift=5.0,
        t_min=20.0,
        t_max=980.0,
      ),
    )
  )


def first_frames(config: ConfigDict, last: bool = False) -> None:
  """Makes a distillation image-to-video: frames for all three networks, and clips to take them from.

  Args:
    config: the experiment.
    last: whether the last frame is given besides the first.

  Raises:
    InputError: a size that has no image-to-video form.
  """
  for name in ('model', 'teacher'):
    config[name] = dit(config.size, i2v=True, flf2v=last)
  config.name += '-flf2v' if last else '-i2v'
  config.log.samples_every = 0  # they are made from captions alone
  config.data = dict(kind='clips', path='')
  config.latents = dict(count=4096, batch=64)
  if config.size == 'nano':
    for name in ('text', 'teacher', 'init', 'student'):
      config.weights[name] = f'assets:nano_i2v_{name}.safetensors'
  else:
    # What salt_jax.precompute makes of a file of prompts and pictures.
    config.data = dict(kind='store', path='first_frames')
    del config.latents
    config.negative = WAN_NEGATIVE_FLF2V if last else WAN_NEGATIVE_I2V
    config.clip = _section(clip.vit_h_14())
    config.weights.clip = 'weights/models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors'
    file = f'weights/Wan2.1-{"FLF2V" if last else "I2V"}-14B.safetensors'
    config.weights.update(teacher=file, critic=file)


def rollout(size: str, **changes) -> ConfigDict:
  """How the student generates: chunks of 3 of 21 latent frames, full cache."""
  fields = dict(
    frames=21,
    chunk=3,
    sink=0,
    window=0,
    mode='sde',
    unroll=False,
    branches=size != 'nano',
    context_noise=0.0,
  )
  return ConfigDict(fields | changes)
