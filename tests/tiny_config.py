"""A config file that trains tiny networks on 21 frames of 32x32 pixels; the argument is the folder of their weights.

python -m salt_jax.main --config=tests/tiny_config.py:FOLDER
python -m salt_jax.main --config=tests/tiny_config.py:FOLDER,streaming
python -m salt_jax.main --config=tests/tiny_config.py:FOLDER,sharded
python -m salt_jax.evaluate --config=tests/tiny_config.py:FOLDER,wan --diagnose=defect --checkpoint=FILE --prompts=FILE
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

from configs import causal_init, pretrain, selfforcing
from salt_jax import convert, recipe, weights
from salt_jax.checkpoint import Checkpoints, write_config
from salt_jax.models import clip, text, vae, wan

DIT = dict(
  dim=32, ffn_dim=48, heads=2, layers=2, text_dim=64, text_len=16, dtype='float32', remat=True
)
TOWER = dict(size=42, patch=14, dim=24, mlp_dim=40, heads=3, layers=3, out_dim=10)  # of 10 rows


def shrink(config, folder):
  for name in ('model', 'teacher'):
    if name in config:
      config[name].update(DIT)
  config.vae.update(dim=4, num_res_blocks=1)
  config.video.update(frames=21, height=32, width=32)
  if 'alignment' in config:
    config.alignment.layer = 1
  if 'rollout' in config:
    config.rollout.update(frames=6, chunk=3)
  if 'weights' in config:
    config.weights.update({name: f'{folder}/{name}.safetensors' for name in config.weights})
  config.evaluate.clips = 0
  config.batch = 8
  config.export_dtype = 'float32'
  config.log.update(every=1, samples_every=0)
  return config


def get_config(folder):
  folder, _, kind = folder.partition(',')
  if kind == 'streaming':
    return get_streaming(folder)
  if kind == 'sharded':
    return get_sharded(folder)
  if kind == 'wan':
    return get_wan(folder)
  config = shrink(selfforcing.get_config('nano'), folder)
  config.total_steps = 6
  config.generator_every = 2
  config.optim.generator.lr = 2e-4
  config.checkpoint.update(every=2, keep=4)
  return config


def get_i2v(folder):
  """The same with networks that are given first frames."""
  config = get_config(folder)
  for name in ('model', 'teacher'):
    config[name].in_channels = 36
  config.data = dict(kind='clips')
  config.latents = dict(count=16, batch=8)
  return config


def get_streaming(folder):
  """Streams of up to 15 latent frames: a clip of 6 and three that add 3, behind a window of 5 with a sink of 1."""
  config = shrink(selfforcing.get_config('nano,backbone=longlive,streaming'), folder)
  config.rollout.update(window=5, sink=1)
  config.streaming.update(frames=15, new=3)
  config.update(total_steps=6, generator_every=2)
  config.checkpoint.update(every=2, keep=4)
  return config


def get_sharded(folder):
  """DMD alone, which compiles fastest, with every array split over all devices; a checkpoint every other step."""
  config = shrink(selfforcing.get_config('nano,method=dmd'), folder)
  config.update(total_steps=6, generator_every=2, rules=(('.*', 'fsdp'),), shard_min_size=1)
  config.mesh.update(data=1, fsdp=-1)
  config.optim.generator.lr = 2e-4
  config.checkpoint.update(every=2, keep=4)
  return config


def get_wan(folder):
  """A student of a real size but for its numbers: UMT5's tokenizer in the folder, no judge, all split over devices."""
  config = _with_umt5(shrink(selfforcing.get_config('1.3b'), folder), folder)
  config.update(rules=(('.*', 'fsdp'),), shard_min_size=16)
  return config


def _with_umt5(config, folder):
  config.text.update(vocab=512, dim=64, dim_attn=64, heads=4, ffn_dim=32, layers=2, dtype='float32')
  config.text_length, config.weights.tokenizer = 16, folder
  return config


def get_pictured(config, folder):
  """A config of a real size that is given pictures, but for its numbers: frames of 32x48, a tokenizer in the folder."""
  config = _with_umt5(shrink(config, folder), folder)
  config.clip.update(TOWER)
  for name in ('model', 'teacher'):
    rows = 10 * (1 + config[name].image_positions)
    config[name].update(image_dim=24, image_len=rows, attention='dense')
  config.video.update(height=32, width=48)
  return config


def get_tower(folder):
  """The same with networks that are given rows of a CLIP tower too."""
  config = get_i2v(folder)
  config.clip = dict(TOWER)
  for name in ('model', 'teacher'):
    config[name].update(image_dim=24, image_len=10)
  config.weights.clip = f'{folder}/clip.safetensors'
  return config


def stage(name, folder):
  """A config of another stage; for the teacher 'teacher,i2v' too."""
  make = pretrain if name == 'vae' or name.startswith('teacher') else causal_init
  config = shrink(make.get_config(name if make is pretrain else f'nano,stage={name}'), folder)
  config.total_steps = 2
  return config


def _write(folder, name, cfg, seed):
  """A file of random parameters in which nothing is 0 or 1."""
  network = weights.NETWORKS.get(name, 'dit')
  rng = np.random.default_rng(seed)

  def noisy(path, x):
    centre = 1.0 if path[-1].key in ('weight', 'gamma') else 0.0
    spread = x.shape[-2] ** -0.5 if path[-1].key == 'kernel' else 0.1
    return (centre + spread * rng.standard_normal(x.shape)).astype(np.float32)

  params = jax.tree_util.tree_map_with_path(noisy, weights.shapes(network, cfg))
  convert.save_params(os.path.join(folder, f'{name}.safetensors'), params, network)


def write_tokenizer(folder, *more):
  """A `spiece.model` of some English and Chinese, and more sentences, with UMT5's symbols at their places."""
  import sentencepiece  # children that read configs alone need none

  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(
      ['a cat walks on the grass, slowly', '色调艳丽,过曝,静态,画面', *more] * 30
    ),
    model_prefix=os.path.join(folder, 'spiece'),
    vocab_size=300,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    num_threads=1,
    minloglevel=2,
  )


def write_weights(folder, i2v=False, tower=False, wan_like=False):
  """Random networks in files, as a stage expects them."""
  config = get_tower(folder) if tower else get_i2v(folder) if i2v else get_config(folder)
  config = get_wan(folder) if wan_like else config
  dit = wan.WanConfig(**(dict(config.model) | {'attention': 'dense'}))
  cfgs = {
    'vae': vae.VAEConfig(
      **{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in config.vae.items()}
    ),
    'text': text.TextConfig(**config.text),
    **{name: dit for name in ('teacher', 'init', 'student', 'ar')},
  }
  if tower:
    cfgs['clip'] = clip.ClipConfig(**config.clip)
  for seed, (name, cfg) in enumerate(cfgs.items()):
    _write(folder, name, cfg, seed)
  return folder


def write_run(workdir, folder):
  """A checkpoint of step 2, as `sample.load` and a restart find it: (workdir, config)."""
  config = get_config(folder)
  shapes = weights.shapes('dit', recipe.build(config).model)
  params = {'generator': jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), shapes)}
  write_config(str(workdir), config)
  checkpoints = Checkpoints(str(workdir / 'checkpoints'))
  checkpoints.save(2, {'state': {'params': params}, 'ema': params}, {'data_step': 2}, force=True)
  checkpoints.close()
  return workdir, config
