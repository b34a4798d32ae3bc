"""What came out: judged clips of held-out captions in a table, and a picture of all methods from the same noise.

  python -m salt_jax.evaluate --checkpoint=RUN --clips=256

makes the table of everything that ships with the nano world, and of a run's student beside it. With
--diagnose=defect,cache,swap,drift it looks into one student instead, with --prompts into one of any size, see
`diagnostics`; and with --vbench=PROMPTS it writes the videos that VBench scores, see `benchmark`.
"""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import PyTree, UInt8
from ml_collections import ConfigDict

from salt_jax import (
  benchmark,
  cli,
  clips,
  codec,
  diagnostics,
  judge,
  loading,
  precompute,
  prompts,
  recipe,
  sample,
  sharding,
  stages,
  statistics,
  subject,
  video,
  weights,
)
from salt_jax.checks import FEW_STEP, FORCED
from salt_jax.errors import InputError
from salt_jax.losses.reconstruction import fold_statistics
from salt_jax.models import vae
from salt_jax.recipe import Recipe
from salt_jax.step import to_unit

log = logging.getLogger('salt_jax.evaluate')

MEASURES = judge.MEASURES
_BATCH = 16


class Method(NamedTuple):
  """A row of the table: a label and `(captions' ids, mask, index) -> latents or uint8 video`."""

  label: str
  run: Callable


class Row(NamedTuple):
  """Judged clips of one method; seconds a clip leave compilation and decoding out."""

  label: str
  videos: UInt8[np.ndarray, 'b f h w 3']
  results: dict[str, np.ndarray]
  seconds: float


def finished(config: ConfigDict, rec: Recipe, networks: dict[str, PyTree]) -> dict[str, PyTree]:
  """The averaged networks as they are exported: a VAE's latents get mean 0 and deviation 1 a channel."""
  if config.stage != 'vae' or not config.statistics_clips:
    return networks
  params = jax.tree.map(jnp.asarray, networks['vae'])
  run = jax.jit(lambda p, x: vae.encode(p, to_unit(x), rec.vae))
  z = np.concatenate(
    [
      run(params, _real(config, index))
      for index in np.arange(config.statistics_clips).reshape(-1, 4)
    ]
  )
  axes = tuple(range(z.ndim - 1))
  log.info('latents: deviation %.3g to %.3g a channel', z.std(axes).min(), z.std(axes).max())
  return {'vae': jax.tree.map(np.asarray, fold_statistics(params, z.mean(axes), z.std(axes)))}


def _real(
  config: ConfigDict, index, split: str = 'train', frames: int = 0
) -> UInt8[np.ndarray, 'b f h w 3']:
  frames = frames or config.video.frames
  return clips.films(np.asarray(index), split, config.seed, frames, config.video.height)


def _given_frames(config: ConfigDict, rec: Recipe, split: str = 'seen') -> Callable:
  """Wraps a maker of samplers: an I2V network is given the first frames of the real clips."""
  if not rec.model.frame_channels:
    return lambda make: make
  given = precompute.given(config, rec)

  def with_frames(sampler):
    return lambda ids, mask, index: sampler(
      ids, mask, index, *given(_real(config, index, split, 1)).values()
    )

  return lambda make: lambda *args: with_frames(make(*args))


def methods(config: ConfigDict, rec: Recipe, networks: dict[str, PyTree]) -> list[Method]:
  """What a stage's own report shows."""
  cfg = config.evaluate
  if config.stage == 'vae':
    return [_real_method(config), _reconstruction(config, rec, networks['vae'])]
  given = _given_frames(config, rec)
  if config.stage == 'flow':
    frozen = {'text': networks['text']} | {'negative': stages.serving(config, rec)['negative']}
    shape = recipe.latent_shape(config)
    make = given(sample.teacher(rec, rec.model, frozen, shape, cfg.guidance))
    return [
      Method(f'teacher, {n} steps', make(networks['dit'], n, cfg.shift)) for n in cfg.teacher_steps
    ]
  if config.stage in FORCED:
    return _forced(config, rec, networks['generator'])
  frozen = stages.serving(config, rec, 'text', 'teacher')
  shape = recipe.latent_shape(config)
  make = given(sample.teacher(rec, rec.teacher, frozen, shape, cfg.guidance))
  rows = [
    Method(
      f'teacher, {cfg.teacher_steps} steps',
      make(frozen['teacher'], cfg.teacher_steps, rec.schedule.shift),
    )
  ]
  few = given(sample.student(rec, frozen))
  if config.stage == 'selfforcing':
    init = weights.load(config.weights.init, 'dit', rec.model)
    rows += [Method(f'causal init, {n} steps', few(init, n)) for n in cfg.steps]
  name = 'student' if config.stage == 'selfforcing' else 'causal init'
  return rows + [Method(f'{name}, {n} steps', few(networks['generator'], n)) for n in cfg.steps]


def _forced(config: ConfigDict, rec: Recipe, params: PyTree) -> list[Method]:
  """Causal Forcing's initial stages: who taught, then who learnt."""
  cfg, name = config.evaluate, 'teacher' if config.stage == 'ar' else 'ar'
  frozen = stages.serving(config, rec, 'text', name)
  many = sample.autoregressive(rec, frozen, cfg.guidance)
  if config.stage == 'ar':
    shape = recipe.latent_shape(config)
    make = sample.teacher(rec, rec.teacher, frozen, shape, cfg.guidance)
    taught = make(frozen[name], cfg.teacher_steps, rec.schedule.shift)
    rows = [Method(f'teacher, {cfg.teacher_steps} steps', taught)]
    return rows + [Method(f'AR diffusion, {n} steps', many(params, n)) for n in cfg.steps]
  few = sample.student(rec, frozen)
  rows = [Method(f'AR diffusion, {cfg.teacher_steps} steps', many(frozen[name], cfg.teacher_steps))]
  return rows + [Method(f'causal init, {n} steps', few(params, n)) for n in cfg.steps]


def _real_method(config: ConfigDict, split: str = 'seen') -> Method:
  return Method('real clips', lambda ids, mask, index: _real(config, index, split))


def _reconstruction(config: ConfigDict, rec: Recipe, params: PyTree, split: str = 'seen') -> Method:
  run = jax.jit(lambda p, x: vae.encode(p, to_unit(x), rec.vae))
  return Method(
    'VAE reconstruction', lambda ids, mask, index: run(params, _real(config, index, split))
  )


def measure(
  config: ConfigDict, rec: Recipe, vae_params: PyTree, rows: list[Method], count: int, split='seen'
) -> list[Row]:
  """Draws `count` clips of each method, on the same captions and from the same noise, and judges them."""
  captions = clips.captions(split, np.arange(count), config.seed)
  ids, mask = stages.tokenizer(config, rec)(captions)
  decode, opinion = codec.decoder(rec, vae_params), judge.train()
  out = []
  for method in rows:
    drawn, spent = [], []
    for at in range(0, count, _BATCH):
      index = np.arange(at, min(at + _BATCH, count), dtype=np.int32)
      began = time.monotonic()
      drawn.append(np.asarray(jax.block_until_ready(method.run(*_placed(ids, mask, index)))))
      spent.append((time.monotonic() - began) / len(index))
    made = np.concatenate(drawn)
    videos = made if made.dtype == np.uint8 else decode(made)
    row = Row(
      method.label,
      videos,
      judge.judge(opinion, videos, captions),
      float(np.median(spent[1:] or spent)),
    )
    out.append(row)
    log.info('%s', _line(row))
  return out


def _placed(ids: np.ndarray, mask: np.ndarray, index: np.ndarray) -> tuple:
  """The captions of some clips, over this process's devices if they share them evenly."""
  batch = ids[index], mask[index], index
  return sharding.over_local_devices(batch) if len(index) % jax.local_device_count() == 0 else batch


def _line(row: Row) -> str:
  means = '  '.join(f'{name} {float(row.results[name].mean()):.3f}' for name in MEASURES)
  return f'{row.label:22s} {means}  {row.seconds:.3f} s/clip'


def table(rows: list[Row]) -> str:
  """Markdown: means, with 95 % bootstrap intervals over the clips."""
  head = (
    '| method | ' + ' | '.join(MEASURES) + ' | s/clip |\n' + '|---' * (len(MEASURES) + 2) + '|\n'
  )
  lines = []
  for row in rows:
    cells = [_cell(name, estimate) for name, estimate in _estimates(row).items()]
    lines.append(f'| {row.label} | ' + ' | '.join(cells) + f' | {row.seconds:.3f} |')
  return head + '\n'.join(lines) + '\n'


def _estimates(row: Row) -> dict:
  return statistics.summary({name: row.results[name] for name in MEASURES})


def _cell(name, estimate):
  digits = 1 if name == 'travel' else 2
  return f'{estimate.mean:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]'


def picture(path: str, rows: list[Row], captions: list[str], count: int) -> None:
  """One block a caption, one row a method, columns are frames."""
  lines = [
    (row.label, caption, row.videos[i])
    for i, caption in enumerate(captions[:count])
    for row in rows
  ]
  video.contact_sheet(path, lines)


def reports(config: ConfigDict) -> bool:
  """Whether a run of this config ends in a report: those of the nano world do."""
  return bool(config.evaluate.clips) and config.size == 'nano'


def check(config: ConfigDict, rec: Recipe) -> None:
  """Reads the VAE that the report decodes with, so that a damaged file is found before training, not behind it.

  Raises:
    InputError: a missing, damaged or other-sized file.
  """
  if reports(config) and config.stage != 'vae':
    weights.load(config.weights.vae, 'vae', rec.vae)


def report(config: ConfigDict, rec: Recipe, networks: dict[str, PyTree], workdir: str) -> None:
  """Writes `report.md`, `report.json` and `samples.png` of a finished run, and prints the table."""
  if jax.process_index() or not reports(config):
    return
  cfg = config.evaluate
  vae_params = (
    networks['vae'] if config.stage == 'vae' else weights.load(config.weights.vae, 'vae', rec.vae)
  )
  rows = measure(config, rec, vae_params, methods(config, rec, networks), cfg.clips)
  captions = clips.captions('seen', np.arange(cfg.clips), config.seed)
  write(workdir, rows, captions, cfg.rows)


def write(folder: str, rows: list[Row], captions: list[str], count: int) -> None:
  """The table as text and as numbers, and the picture."""
  os.makedirs(folder, exist_ok=True)
  text = table(rows)
  with open(os.path.join(folder, 'report.md'), 'w') as file:
    file.write(text)
  numbers = {
    row.label: {'seconds': row.seconds} | {k: list(v) for k, v in _estimates(row).items()}
    for row in rows
  }
  with open(os.path.join(folder, 'report.json'), 'w') as file:
    json.dump({'clips': len(captions), 'rows': numbers}, file, indent=1)
  picture(os.path.join(folder, 'samples.png'), rows, captions, count)
  print(text)
  log.info('wrote report.md, report.json and samples.png to %s', folder)


def shipped(
  config: ConfigDict, rec: Recipe, checkpoint: str | None, split: str = 'seen'
) -> list[Method]:
  """Every row of the card: the networks that ship, and the student of a run."""
  weights.require(config, ('text', 'teacher', 'vae', 'init', 'student'))
  own = loading.student_of(checkpoint, rec) if checkpoint else None
  frozen = stages.serving(config, rec, 'text', 'teacher', 'vae')
  given, shape = _given_frames(config, rec, split), recipe.latent_shape(config)
  make = given(sample.teacher(rec, rec.teacher, frozen, shape, config.evaluate.guidance))
  few = given(sample.student(rec, frozen))
  rows = [_real_method(config, split), _reconstruction(config, rec, frozen['vae'], split)]
  for n in (50, 24, 4, 2):
    label = f'teacher, {n} steps' if n > 4 else f'teacher cut to {n} steps'
    rows.append(Method(label, make(frozen['teacher'], n, rec.schedule.shift)))
  students = {'causal init': weights.load(config.weights.init, 'dit', rec.model)}
  if own:
    students['student of the run'] = own
  if os.path.isfile(weights.resolve(config.weights.student)):
    students['longer-trained student'] = weights.load(config.weights.student, 'dit', rec.model)
  else:
    log.warning('no longer-trained student at %s: its rows are left out', config.weights.student)
  return rows + [
    Method(f'{name}, {n} steps', few(params, n))
    for name, params in students.items()
    for n in (4, 2)
  ]


def define_flags() -> None:
  cli.define_config('Sizes and weights of the nano world.', 'configs/selfforcing.py:nano')
  flags.DEFINE_string(
    'checkpoint',
    None,
    'Workdir or exported file of a student, to put beside the shipped ones or to look into.',
  )
  flags.DEFINE_string(
    'diagnose',
    None,
    f'Instead of the table, look into --checkpoint: some of {",".join(diagnostics.NAMES)}.',
  )
  flags.DEFINE_string(
    'prompts',
    None,
    'Prompts for --diagnose, .txt, .jsonl or .csv: students of other sizes than nano need them.',
  )
  flags.DEFINE_integer('clips', 64, 'Clips a row, or of --diagnose.', lower_bound=1)
  flags.DEFINE_enum(
    'split', 'seen', ['seen', 'unseen'], 'Held-out images in captions seen or not seen in training.'
  )
  flags.DEFINE_string(
    'output',
    'runs/evaluate',
    'Folder for the report, for NAME.json and NAME.png of a diagnostic, or for the videos of --vbench.',
  )
  benchmark.define_flags()


def program() -> None:
  args = flags.FLAGS
  if args.prompts is not None and args.diagnose is None:
    raise InputError(
      '--prompts has no use without --diagnose: --vbench takes its own, and the table captions.'
    )
  if args.vbench is not None:
    benchmark.export(args)
    return
  if args.diagnose is not None:
    diagnose(args)
    return
  rec = recipe.build(args.config)
  if args.config.size != 'nano' or args.config.stage not in FEW_STEP:
    raise InputError(
      f'{args.config.name} cannot be judged: pass --config=configs/selfforcing.py:nano.'
    )
  cli.check_folder('output', args.output)
  vae_params = weights.load(args.config.weights.vae, 'vae', rec.vae)
  rows = shipped(args.config, rec, args.checkpoint, args.split)
  rows = measure(args.config, rec, vae_params, rows, args.clips, args.split)
  captions = clips.captions(args.split, np.arange(args.clips), args.config.seed)
  write(args.output, rows, captions, args.config.evaluate.rows)


def diagnose(args: flags.FlagValues) -> None:
  """Looks into one student, with the config it was made with unless the command names another.

  Raises:
    InputError: an unknown diagnostic, no checkpoint, one that does not fit, or prompts that cannot be read.
  """
  asked = diagnostics.names(args.diagnose)
  if not args.checkpoint:
    raise InputError(
      '--diagnose looks into one student: pass --checkpoint, the workdir of a run, an exported file, or '
      'assets:nano_student.safetensors.'
    )
  texts = None if args.prompts is None else _texts(args)
  config, rec, load = _student(args)
  diagnostics.check(asked, config, rec, texts is not None)
  cli.check_folder('output', args.output)
  if texts is None:
    wanted = subject.captioned(config, rec, args.split, args.clips)
  else:
    wanted = subject.prompted(config, rec, texts)
    if len(texts) < args.clips:
      log.warning('%s has %d prompts: no more clips are made.', args.prompts, len(texts))
  size = args.batch if texts is not None or args['batch'].present else None
  student = subject.subject(config, rec, load(), wanted, size)
  if texts is None and set(asked) != {'defect'}:
    student = dataclasses.replace(student, opinion=judge.train())
  diagnostics.run(asked, student, args.output)


def _texts(args: flags.FlagValues) -> list[str]:
  """The first --clips prompts of the file --prompts.

  Raises:
    InputError: a file that cannot be read, or a split besides.
  """
  if args['split'].present:
    raise InputError(
      '--split chooses captions of the nano world: leave it out, or --prompts, which come instead.'
    )
  return [entry.prompt for entry in prompts.read(args.prompts)][: args.clips]


def _student(args: flags.FlagValues) -> tuple[ConfigDict, Recipe, Callable[[], PyTree]]:
  """Config and recipe of --checkpoint, and what reads its parameters; --config describes a file that does not itself.

  Raises:
    InputError: nothing there, or it does not fit --config.
  """
  path, given = args.checkpoint, cli.config_is_given()
  own = not given or loading.describes_itself(path)
  config, rec = loading.described(path, None if own else args.config)
  if own and given:
    config, rec = args.config, _other_recipe(args, rec)
    return config, rec, lambda: loading.student_of(path, rec)
  return config, rec, lambda: weights.load_narrowed(path, 'dit', rec.model)


def _other_recipe(args: flags.FlagValues, own: Recipe) -> Recipe:
  """The recipe of --config, which must be for the same kind of student."""
  rec = recipe.build(args.config)
  if rec.chunking is None or rec.chunking.causal != own.chunking.causal:
    kind = 'causal' if own.chunking.causal else 'bidirectional'
    raise InputError(
      f'{args.checkpoint} is a {kind} student, which {args.config.name} does not describe: leave --config out, or '
      'pass the one it was trained with.'
    )
  return rec


if __name__ == '__main__':
  cli.run(program, define_flags)
