"""What the VAE takes of each chip at a size, as the compiler for a TPU states it; no TPU is needed.

  JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m salt_jax.codec_memory --topology=v5e:2x2 --devices=4

compiles a part in the middle of a video, split as `codec` splits it, in minutes. libtpu comes with the extra `tpu`.
"""

import functools

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from salt_jax import cli, codec
from salt_jax.errors import InputError
from salt_jax.models import vae
from salt_jax.sharding import over_space, replicated

GIB = 2**30


def figures(compiled: jax.stages.Compiled) -> dict[str, float]:
  """GiB of one device: arguments and results that stay, what is needed on the way at most, and their sum."""
  found = compiled.memory_analysis()
  kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  sizes = {'kept': kept, 'temporary': found.peak_memory_in_bytes - kept}
  sizes['all'] = found.peak_memory_in_bytes
  return {name: size / GIB for name, size in sizes.items()}


def lowered(
  devices: list, size: tuple[int, int], part: int, cfg: vae.VAEConfig, encode: bool
) -> jax.stages.Lowered:
  """The program of a part of one clip, which is not the first, over some devices.

  Args:
    devices: real ones, or those of a topology.
    size: (height, width) in pixels.
    part: latent frames.
    cfg: sizes of the VAE.
    encode: of pixels; otherwise of latents.
  """
  rows, columns = size[0] // cfg.space, size[1] // cfg.space
  where = over_space(1, rows, columns, devices) if len(devices) > 1 else None
  alone = SingleDeviceSharding(devices[0])

  def placed(tree: PyTree, sharding) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

  if encode:
    run, shape = codec._encode_part, (1, part * cfg.time, *size, 3)
    features = functools.partial(vae.init_encode_cache, cfg, 1, *size)
  else:
    run, shape = codec.decode_part, (1, part, rows, columns, cfg.z_dim)
    features = functools.partial(vae.init_decode_cache, cfg, 1, rows, columns)
  given = (jax.ShapeDtypeStruct(shape, jnp.float32), jax.eval_shape(features))
  params = placed(vae.param_shapes(cfg), replicated(where.mesh) if where else alone)
  return run.lower(params, *placed(given, where or alone), cfg, False, where)


def define_flags() -> None:
  flags.DEFINE_string('topology', 'v5e:2x2', 'Slice to compile for, as libtpu names it.')
  flags.DEFINE_integer('devices', 1, 'Chips of it that share a frame.', lower_bound=1)
  flags.DEFINE_integer('height', 720, 'Pixels.', lower_bound=8)
  flags.DEFINE_integer('width', 1280, 'Pixels.', lower_bound=8)
  flags.DEFINE_integer('part', 1, 'Latent frames at once.', lower_bound=1)
  flags.DEFINE_bool('encode', False, 'Encode instead of decode.')


def program() -> None:
  args = flags.FLAGS
  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=args.topology).devices
  except (RuntimeError, ValueError) as error:
    raise InputError(
      f'--topology={args.topology} cannot be compiled for: name one such as v5e:2x2, and install the extra tpu.'
    ) from error
  if len(devices) < args.devices:
    raise InputError(f'--devices={args.devices}: {args.topology} has {len(devices)}.')
  size = args.height, args.width
  made = lowered(devices[: args.devices], size, args.part, vae.wan_vae(), args.encode)
  try:
    found = figures(made.compile())
  except jax.errors.JaxRuntimeError as error:
    raise InputError(str(error).partition('\n')[0][:200]) from error
  print(', '.join(f'{name} {size:.1f} GiB' for name, size in found.items()))


if __name__ == '__main__':
  cli.run(program, define_flags)
