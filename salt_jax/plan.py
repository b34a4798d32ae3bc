"""Does a config fit a TPU slice? Its programs are compiled for the slice on a machine without a TPU.

  python -m salt_jax.plan --config=configs/selfforcing.py --slice=v5p-128
  python -m salt_jax.plan --config=configs/selfforcing.py --smallest=v6e --json=plans/v6e.json
  python -m salt_jax.plan --table=plans

Networks and batches are shapes alone: nothing is read, and nothing is allocated. Several slices are 2xv5p-128. A slice
is taken with the mesh of the config; --smallest tries the slices of a generation, smallest first (--smallest=v6e-64:
from that one on), and where the batch has fewer clips than there are devices it splits each clip over the context axis.
--kept names a folder of what programs were found to need: equal ones are compiled once, and a search that was cut off
goes on. --table writes what --json left in a folder as Markdown.
"""

import dataclasses
import glob
import json
import logging
import math
import os
import sys

import jax
from absl import flags
from ml_collections import ConfigDict

from salt_jax import checks, cli, estimate, kept, lowered, recipe, sharding, slices, splits
from salt_jax.errors import InputError
from salt_jax.estimate import REACHED, Report
from salt_jax.flops import PEAK_FLOPS
from salt_jax.slices import GIB, Slice

log = logging.getLogger('salt_jax.plan')


def define_flags() -> None:
  cli.define_config('Experiment, such as configs/selfforcing.py.')
  flags.DEFINE_string('slice', None, 'TPU slice, such as v5p-128, v6e-64, tpu7x-64 or 2xv5p-128.')
  flags.DEFINE_string(
    'smallest',
    None,
    'Generation whose smallest slice to find, v4, v5e, v5p, v6e or tpu7x; or the slice to begin with.',
  )
  flags.DEFINE_list(
    'programs', [], f'Which to compile, of {",".join(lowered.NAMES)}; all by default.'
  )
  flags.DEFINE_string(
    'json', None, 'File for the figures; of the same slice it keeps the programs that it has.'
  )
  flags.DEFINE_string(
    'kept',
    None,
    'Folder that keeps what each program was found to need, so that a search goes on where it was cut off.',
  )
  flags.DEFINE_string('table', None, 'Folder of such files to make a Markdown table of.')


def plan(
  config: ConfigDict,
  slice_: Slice,
  names: tuple[str, ...] = (),
  reports: kept.Reports | None = None,
) -> list[Report]:
  """What the programs of a config need on a device of a slice; stops behind the first that does not fit.

  Args:
    config: the experiment.
    slice_: the slice.
    names: programs to compile; none named means all.
    reports: where what was found is kept.

  Raises:
    InputError: a config, mesh or batch that cannot work, or an unknown program.
  """
  rec = recipe.build(config, ('tpu', slice_.generation.kind))
  mesh = _mesh(config, slice_)
  found, made = lowered.of_config(config, rec, mesh, slices.devices(slice_.host)), []
  unknown = [name for name in names if name not in found]
  if unknown:
    raise InputError(
      f'--programs={unknown[0]} is no program of this config: choose from {", ".join(found)}.'
    )
  for name in names or found:
    log.info('%s: compiling %s …', slice_.name, name)
    made.append(estimate.report(found[name], config, mesh, slice_, reports))
    if not made[-1].fits:
      break
  return made


def _mesh(config: ConfigDict, slice_: Slice) -> jax.sharding.Mesh:
  mesh = sharding.make_mesh(config.mesh, slices.devices(slice_))
  splits.check_mesh(config, mesh)
  return mesh


def smallest(
  config: ConfigDict,
  word: str,
  names: tuple[str, ...] = (),
  reports: kept.Reports | None = None,
) -> tuple[ConfigDict, Slice, list[Report], list[dict]]:
  """The smallest slice that everything fits on, by trying those of `slices.candidates` in order.

  Returns:
    (the config with the mesh of that slice, the slice, its reports, what did not fit before it).

  Raises:
    InputError: nothing fits.
  """
  # A mesh that cannot work is passed over below; a config that cannot is refused at once.
  checks.check(config)
  failed = []
  tried = slices.candidates(word)
  for slice_ in tried:
    sized = meshed(config, slice_)
    try:
      _mesh(sized, slice_)
    except InputError as error:
      if sized.mesh.context == 1:
        raise
      log.info('%s: %s', slice_.name, error)
      failed.append({'slice': slice_.name, 'step': '', 'why': str(error)})
      continue
    made = plan(sized, slice_, names, reports)
    if made[-1].fits:
      return sized, slice_, made, failed
    last = made[-1]
    failed.append(
      {'slice': slice_.name, 'step': last.step, 'needed': last.needed, 'change': last.change}
    )
    log.info('%s', _too_much(slice_, last))
  raise InputError(
    f'{config.name} fits no {tried[-1].generation.name} slice of up to {tried[-1].chips} chips: '
    f'{failed[-1].get("change") or failed[-1].get("why")}'
  )


def resolved(config: ConfigDict, slice_: Slice) -> ConfigDict:
  """The config with the sizes that its mesh has on a slice.

  Raises:
    InputError: a mesh that does not make up the devices.
  """
  sized = ConfigDict(config.to_dict())
  sized.mesh.update(sharding.make_mesh(config.mesh, slices.devices(slice_)).shape)
  return sized


def meshed(config: ConfigDict, slice_: Slice) -> ConfigDict:
  """The config with a mesh for a slice: a clip a device while the batch lasts, then a clip over several."""
  sized = ConfigDict(config.to_dict())
  one = slice_.devices // slice_.count
  fsdp = math.gcd(one, max(1, config.batch // (slice_.count * splits.parts(config))))
  sized.mesh.update(data=slice_.count, fsdp=fsdp, context=one // fsdp, tensor=1)
  return sized


def _too_much(slice_: Slice, last: Report) -> str:
  return (
    f'{slice_.name}: {last.step} does not fit: it needs {last.needed / GIB:.1f} GiB a device, and '
    f'{last.usable / GIB:.2f} GiB are available; {last.change}'
  )


def written(config: ConfigDict, slice_: Slice, made: list[Report]) -> str:
  """The reports as text."""
  generation = slice_.generation
  axes = ', '.join(f'{axis}={size}' for axis, size in config.mesh.items())
  parts = f' in {splits.parts(config)} parts' if splits.parts(config) > 1 else ''
  lines = [
    f'{config.name} on {slice_.name}: {slice_.chips} chips, {slice_.devices} devices of {generation.hbm / GIB:.2f} GiB '
    f'each; mesh {axes}; batch {config.batch}{parts}. All figures are of one device'
    + (', two of which are a chip.' if generation.cores > 1 else '.')
  ]
  for one in made:
    lines += ['', *_lines(one, slice_)]
  if total := _verdict([dataclasses.asdict(one) for one in made])['iteration_seconds']:
    lines += [
      '',
      f'an iteration of training: at least {total["least"]:.1f} s, likely {total["likely"]:.1f} s',
    ]
  return '\n'.join([*lines, '', _assumptions(slice_)])


def _lines(one: Report, slice_: Slice) -> list[str]:
  if not one.fits:
    return [_too_much(slice_, one)]
  total, s = one.forward + one.backward, one.seconds
  rows = [
    f'{one.step} fits: {one.needed / GIB:.2f} of {one.usable / GIB:.2f} GiB',
    f'  memory     arguments {one.arguments / GIB:.2f}, temporaries {one.temporaries / GIB:.2f}, '
    f'code {one.code / GIB:.2f} GiB; {one.clips:g} clips of a shard at once',
    f'  FLOPs      {total / 1e12:.4g} TFLOP: forward {one.forward / total:.0%}, backward {one.backward / total:.0%}; '
    f'recomputed besides {one.again / 1e12:.4g} TFLOP ({one.again / total:.0%})',
  ]
  for kind, row in one.collectives.items():
    rows.append(
      f'  {kind:<18} {row["count"]:>8.0f} times, {row["bytes"] / 1e9:>9.2f} GB, of which {row["sent"] / 1e9:.2f} sent'
    )
  if one.crossing:
    rows.append(f'  between slices {one.crossing / 1e9:.2f} GB sent')
  rows += [
    f'  time       at least {s.least:.2f} s: compute {s.compute:.2f}, HBM {s.memory:.2f}, network {s.network:.2f}; '
    f'likely {s.likely:.1f} s',
    f'  compiled in {one.compiling[0]:.0f} s ({one.compiling[1]:.0f} s of CPU)',
  ]
  return rows


def _assumptions(slice_: Slice) -> str:
  g = slice_.generation
  between = f', {g.dcn / 1e9:.3g} GB/s between slices' if g.dcn and slice_.count > 1 else ''
  if slice_.count > 1 and g.dcn is None:
    between = '; what goes between slices is not in the times, for its rate is not documented'
  return (
    f'Peaks of a device: {PEAK_FLOPS[g.kind] / 1e12:.4g} TFLOP/s in bfloat16, {g.hbm_rate / 1e9:.4g} GB/s of HBM, '
    f'{g.ici / 1e9:.4g} GB/s out over all links{between} (docs.cloud.google.com/tpu/docs). "At least" is the slowest '
    f'of the three at its peak; "likely" is {REACHED:.0%} of the compute peak with the network behind it, not '
    'overlapped. FLOPs are by formula (salt_jax/flops.py), those of the VAE by the compiler, in the mean over step '
    'counts and exits. Among collectives, conditional terms count in full and loops of drawn length by their mean.'
  )


def record(config: ConfigDict, slice_: Slice, made: list[Report], failed: list[dict]) -> dict:
  """The figures as JSON holds them."""
  rows = [dataclasses.asdict(one) for one in made]
  return {
    'config': config.name,
    'slice': slice_.name,
    'chips': slice_.chips,
    'devices': slice_.devices,
    'mesh': dict(config.mesh),
    'batch': config.batch,
    'accumulate': splits.parts(config),
    'versions': kept.versions(),
    'programs': rows,
    'smaller': failed,
  } | _verdict(rows)


def _verdict(rows: list[dict]) -> dict:
  """Whether all fits, and seconds of an iteration if all steps of training are there."""
  steps = [one for one in rows if one['every']]
  total = None
  if steps and all(one['seconds'] for one in steps) and len(steps) == steps[0]['steps']:
    total = {k: sum(one['seconds'][k] / one['every'] for one in steps) for k in ('least', 'likely')}
  return {'fits': all(one['fits'] for one in rows), 'iteration_seconds': total}


def check_json(path: str) -> None:
  """Refuses a file that the figures could not go into, before anything is compiled.

  Raises:
    InputError: nothing can be written there, or there is a folder, or a file of something else.
  """
  cli.check_folder('json', os.path.dirname(path))
  if os.path.isdir(path):
    raise InputError(f'--json={path} is a folder: name a file in it.')
  if os.path.isfile(path):
    _read(path)


def merged(path: str, new: dict) -> dict:
  """A record with the programs that a file holds already of the same config, slice and mesh."""
  if not os.path.isfile(path):
    return new
  old = _read(path)
  same = ('command', 'slice', 'mesh', 'batch', 'accumulate', 'versions')
  if any(({'accumulate': 1} | old).get(key) != new[key] for key in same):
    return new
  programs = {one['step']: one for one in (*old['programs'], *new['programs'])}
  made = [programs[name] for name in lowered.NAMES if name in programs]
  return new | _verdict(made) | {'programs': made, 'smaller': new['smaller'] or old['smaller']}


def table(folder: str) -> str:
  """The records of a folder as Markdown, a row a file.

  Raises:
    InputError: no records there, or one that is damaged.
  """
  paths = sorted(glob.glob(os.path.join(folder, '*.json')))
  if not paths:
    raise InputError(f'--table={folder}: no files that --json wrote lie there.')
  head = (
    'config',
    'slice',
    'chips',
    'mesh',
    'GiB',
    *lowered.NAMES,
    'iteration',
    'next smaller',
    'compile',
  )
  rows = [head, ('---',) * len(head), *(_row(path) for path in paths)]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _row(path: str) -> tuple[str, ...]:
  found = _read(path)
  try:
    made, total = {one['step']: one for one in found['programs']}, found['iteration_seconds']
    usable = next(iter(made.values()))['usable'] / GIB
    axes = ', '.join(
      f'{axis} {found["mesh"][axis]}' for axis in sharding.AXES if found['mesh'][axis] != 1
    )
    return (
      found['command'].removeprefix('configs/'),
      found['slice'],
      str(found['chips']),
      axes,
      f'{usable:.2f}',
      *(_cell(made.get(name)) for name in lowered.NAMES),
      f'{total["least"]:.1f} to {total["likely"]:.1f} s' if total else '–',
      _smaller(found['smaller']),
      f'{max(one["compiling"][1] for one in made.values()):.0f} s of CPU',
    )
  except (KeyError, TypeError, StopIteration) as error:
    raise InputError(
      f'--table: {path} is no file of --json ({error!r}): write it again.'
    ) from error


def _cell(one: dict | None) -> str:
  if one is None:
    return 'not run'
  return (
    f'{one["needed"] / GIB:.1f}' if one['fits'] else f'**{one["needed"] / GIB:.1f}: does not fit**'
  )


def _smaller(failed: list[dict]) -> str:
  """What kept the next smaller slice from fitting."""
  if not failed:
    return 'not tried'
  last = failed[-1]
  return (
    f'{last["slice"]}: {last["step"]} {last["needed"] / GIB:.1f}' if last['step'] else last['slice']
  )


def _read(path: str) -> dict:
  try:
    with open(path, encoding='utf-8') as file:
      found = json.load(file)
    return found | {'programs': [dict(one) for one in found['programs']]}
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise InputError(
      f'{path} is no file of --json ({error!r}): delete it, and write it anew.'
    ) from error


def _experiment() -> str:
  """The words of the command that name the config."""
  words = [word for word in sys.argv[1:] if word.lstrip('-').startswith('config')]
  return ' '.join(word.lstrip('-').removeprefix('config=') for word in words)


def program() -> None:
  args = flags.FLAGS
  if args.table:
    print(table(args.table))
    return
  if args.config is None or bool(args.slice) == bool(args.smallest):
    raise InputError('pass --config=FILE, and either --slice=v5p-128 or --smallest=v5p.')
  if args.json:
    check_json(args.json)
  if args.kept:
    cli.check_folder('kept', args.kept)
  slices.prepare()
  config, failed, names = args.config, [], tuple(args.programs)
  reports = kept.Reports(args.kept) if args.kept else None
  if args.slice:
    slice_ = slices.parse(args.slice)
    config = resolved(config, slice_)
    made = plan(config, slice_, names, reports)
  else:
    config, slice_, made, failed = smallest(config, args.smallest, names, reports)
  print(written(config, slice_, made))
  if args.json:
    found = merged(args.json, {'command': _experiment()} | record(config, slice_, made, failed))
    kept.write(args.json, found)
  if not made[-1].fits:
    sys.exit(1)


if __name__ == '__main__':
  # An executable for devices that are not here cannot be read back.
  jax.config.update('jax_enable_compilation_cache', False)
  cli.run(program, define_flags)
