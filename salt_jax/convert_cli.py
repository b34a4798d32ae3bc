"""Weights in and out: every common naming and container, tensor by tensor, with a report.

  python -m salt_jax.convert --input=model.pt --entry=generator_ema --size=1.3b --output=student.safetensors

The input is a safetensors or torch file, the index of a sharded one, or the workdir of a run; the
output a safetensors file in the names of Wan, diffusers or ComfyUI, with its SHA-256 beside it, or
(`--names=orbax --config=...`) a folder that `salt_jax.sample` samples and that a stage starts from.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from salt_jax import checkpoint, cli, convert, lora, names, run_weights, tensor_files, weights
from salt_jax.checks import FEW_STEP, section
from salt_jax.conversion import (
  ORBAX,
  Conversion,
  Refused,
  Request,
  convert_source,
  expected,
  lines,
  matches,
)
from salt_jax.errors import InputError
from salt_jax.models import wan
from salt_jax.names import listed
from salt_jax.sources import Source, open_source
from salt_jax.tensor_files import Tensor
from salt_jax.wan_names import NETWORKS


def write_file(path: str, conversion: Conversion, metadata: Mapping[str, str], source: str) -> str:
  """Writes a safetensors file and its checksum; returns the checksum."""
  digest = tensor_files.write(path, conversion.tensors, metadata, source)
  tensor_files.write_checksum(path, digest)
  return digest


def write_run(folder: str, conversion: Conversion, config: ConfigDict) -> None:
  """Writes a workdir of the one averaged network 'generator', at step 0.

  `salt_jax.sample` samples it, and a stage takes it as one of its weights.

  Raises:
    InputError: weights are missing, not finite, or of another size.
  """
  source = conversion.report['files'][0]
  sound = {name: tensor_files.finite(source, name, x) for name, x in conversion.wan.items()}
  tree = convert.from_tensors(sound, 'dit')
  convert.check(tree, weights.shapes('dit', section(wan.WanConfig, config, 'model')))
  with tensor_files.draft(folder.rstrip('/')) as name:
    run_weights.write(os.path.join(name, 'checkpoints'), {'generator': tree})
    checkpoint.write_config(name, config)


def define_flags() -> None:
  string, many = flags.DEFINE_string, flags.DEFINE_multi_string
  string('input', None, 'Weights: a file, an index of shards, a folder of one of these, or a run.')
  string('output', None, 'File to write (.safetensors), or a new folder for --names=orbax.')
  string('entry', '', 'Part of a torch file or a run, such as generator_ema or generator.')
  string('size', '', 'Size of the network, such as 1.3b; by default what the config says.')
  string('report', None, 'Where the report goes, as JSON; OUTPUT.report.json by default.')
  flags.DEFINE_enum('network', 'dit', NETWORKS, 'What the weights are of.')
  flags.DEFINE_enum('names', 'wan', (*names.NAMINGS, ORBAX), 'Names and container of the output.')
  flags.DEFINE_enum('dtype', 'keep', ('keep', *convert.DTYPES), 'Type of the numbers written.')
  many('lora', [], 'LoRA file to merge; may be given several times.')
  flags.DEFINE_float('lora_alpha', None, 'Alpha of LoRA files without one; the rank by default.')
  many('allow_unused', [], 'Pattern (a*b?) of input names that may go unused.')
  many('allow_missing', [], "Pattern of Wan's names that may be missing.")
  cli.define_config('Experiment that the weights are for: their size, and how they are sampled.')


def _check(args) -> None:
  if not args.input:
    raise InputError(
      'pass --input: a file of weights, an index of shards, or the workdir of a run.'
    )
  if not args.output:
    raise InputError('pass --output: the file to write, such as student.safetensors.')
  if args.names == ORBAX:
    if args.network != 'dit' or args.dtype not in ('keep', 'float32'):
      raise InputError('--names=orbax is for a DiT in float32; leave --network and --dtype out.')
  elif not args.output.endswith('.safetensors'):
    raise InputError(f'--output={args.output} must end in .safetensors.')
  if args.names == 'comfyui' and args.network != 'dit':
    raise InputError(f'--names=comfyui is for a DiT; choose wan or diffusers for {args.network}.')
  if args.lora and args.network != 'dit':
    raise InputError(f'--lora is for a DiT, not for {args.network}; leave it out.')
  if args.size and args.config is not None:
    raise InputError('--size has no use beside --config, which knows it; leave one of them out.')
  cli.check_folder('output', os.path.dirname(args.output))
  if args.report:
    cli.check_folder('report', os.path.dirname(args.report))


def _updates(args, found: Mapping[str, Tensor]) -> dict[str, lora.Update]:
  pairs = {}
  # LongLive keeps both in one file.
  part = 'critic_lora' if args.entry.startswith('critic') else 'generator_lora'
  for path in args.lora:
    source = open_source(path, default=part)
    more, unknown = lora.updates(source.tensors, found, args.lora_alpha)
    unknown = [key for key in unknown if not matches(key, args.allow_unused)]
    if unknown:
      raise InputError(
        f'{path} has LoRA tensors for no weight: {listed(unknown)}; name them with '
        '--allow_unused=PATTERN if that is meant.'
      )
    if twice := pairs.keys() & more.keys():
      raise InputError(f'two LoRA files are for {listed(twice)}; merge one after the other.')
    pairs |= more
  return pairs


def _metadata(source: Source, config: ConfigDict | None, args) -> dict[str, str]:
  """What goes along in the file; with a config `salt_jax.sample` can sample it."""
  out = {'format': 'pt'}
  if args.names == 'wan' and config is not None:
    network = source.metadata.get('network') or source.entry.removesuffix('_ema')
    out |= {'config': config.to_json_best_effort(), 'network': network or 'generator'}
  return out


def _refuse_output(args, source: Source) -> None:
  files = [*source.files, *args.lora]
  if os.path.exists(args.output) and any(os.path.samefile(args.output, f) for f in files):
    raise InputError(f'--output={args.output} is what is read; name another file.')
  if os.path.isdir(args.output) and (args.names != ORBAX or os.listdir(args.output)):
    raise InputError(f'--output={args.output} is not empty; name a new folder.')


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
  """Lets a stop from outside go through what removes half-written files."""
  before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def program() -> None:
  args = flags.FLAGS
  _check(args)
  with stoppable():
    _run(args)


def _run(args) -> None:
  source = open_source(weights.resolve(args.input), args.entry, args.network)
  _refuse_output(args, source)
  config = args.config if args.config is not None else source.config
  if args.names == ORBAX and (config is None or config.get('stage') not in FEW_STEP):
    raise InputError(
      '--names=orbax needs --config: a few-step experiment that the weights are for.'
    )
  request = Request(
    network=args.network,
    naming=args.names,
    dtype='float32' if args.names == ORBAX else args.dtype,
    allow_unused=tuple(args.allow_unused),
    allow_missing=tuple(args.allow_missing),
  )
  want = expected(args.network, args.size, config)
  try:
    done = convert_source(source, want, request, lambda found: _updates(args, found))
  except Refused as error:
    if args.report:
      _write_report(args.report, dict(error.report))
    raise
  if args.names == ORBAX:
    write_run(args.output, done, config)
  else:
    metadata = _metadata(source, config, args)
    done.report['sha256'] = write_file(args.output, done, metadata, source.files[0])
  _write_report(args.report or args.output.rstrip('/') + '.report.json', done.report)
  print('\n'.join(lines(done.report)))


def _write_report(path: str, report: Mapping[str, Any]) -> None:
  with tensor_files.draft(path) as name, open(name, 'w', encoding='utf-8') as file:
    json.dump(report, file, indent=1)
